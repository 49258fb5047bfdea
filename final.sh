# The final tables on free cores, about nine minutes, twelve at most. Everything it needs was made before: runs/unet, runs/dit (qvd-w8a8),
# runs/unet-fast, runs/dit-fast (tuned, default gate on 64 clips). Results: runs/final/*.md, *.txt.
cd /work/exp/speed
export PYTHONPATH=src:.
unset OMP_NUM_THREADS
mkdir -p runs/final runs/speed
D=$(.venv/bin/python -c "from reelquant.recipes.recipe import load_recipe; print(load_recipe('qvd-w8a8').digest()[:8])")
[ -d runs/speed/tiny-unet-qvd-w8a8-$D ] || cp -r runs/unet runs/speed/tiny-unet-qvd-w8a8-$D
[ -d runs/speed/tiny-dit-qvd-w8a8-$D ] || cp -r runs/dit runs/speed/tiny-dit-qvd-w8a8-$D
bench() { # folder reference threads options
  echo "== $1 $3 threads ${*:4}"
  timeout 70 .venv/bin/python -m reelquant benchmark runs/$1 --reference $2 --threads $3 --dtype float32 --rounds 5 --no-memory "${@:4}" 2>/dev/null | grep -v "^ *$"
}
for t in 1 2; do
  bench unet-fast tiny-unet $t --runtime openvino
  bench unet-fast tiny-unet $t
  bench dit-fast tiny-dit $t
  bench dit-fast tiny-dit $t --runtime openvino
done > runs/final/tuned.txt
timeout 130 .venv/bin/python -m benchmarks.end_to_end --pipeline tiny-dit --cores --clips 1 --rounds 5 --output runs/final > runs/final/cores-tiny-dit.txt 2>/dev/null
timeout 200 .venv/bin/python -m benchmarks.end_to_end --pipeline tiny-unet --cores --clips 1 --rounds 3 --output runs/final > runs/final/cores-tiny-unet.txt 2>/dev/null
cat runs/final/tuned.txt runs/final/cores-*.md
