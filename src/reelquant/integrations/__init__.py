"""Plug-ins for other libraries: diffusers, transformers, PEFT. Each is imported after its library. What works without these libraries'
hooks does not belong here."""
