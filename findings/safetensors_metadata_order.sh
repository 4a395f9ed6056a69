#!/usr/bin/env bash
# safetensors 0.8.0: one dictionary of tensors and one dictionary of metadata give files of different bytes.
#
# Guess before the run: the header is written in the order of the dictionaries, so equal calls give equal files.
# Seen: with two metadata keys, `save_file` writes them in either order, and 20 processes give two different files. With
# one key, all files are equal. A checksum of a file therefore does not show whether two runs have the same weights.
#
# Output: two keys: 2 different files of 20
#         one key: 1 different files of 20
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cat > "$folder/write.py" <<'P'
import sys
import numpy
from safetensors.numpy import save_file

metadata = {"format": "pt", "sha256": "0" * 64}
keys = list(metadata)[: int(sys.argv[2])]
save_file({"x": numpy.zeros(4, numpy.float32)}, sys.argv[1], {key: metadata[key] for key in keys})
P
count() {
  for number in $(seq 20); do "$folder/venv/bin/python" "$folder/write.py" "$folder/$1-$number" "$1"; done
  sha256sum "$folder/$1"-* | cut -d ' ' -f 1 | sort -u | wc -l
}
two=$(count 2)
one=$(count 1)
echo "two keys: $two different files of 20"
echo "one key: $one different files of 20"
[[ $two == 2 && $one == 1 ]]
