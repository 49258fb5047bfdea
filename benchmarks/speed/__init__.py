"""Parts of the speed benchmarks: timing, memory, the machine's limits, shapes, denoisers, variants, charts."""
