#!/usr/bin/env bash
# silero-vad 6.2.3: importing it sets torch to one thread, for everything else in the process too.
#
# Guess before the run: an import changes nothing that other code sees; a model that is faster on one thread would say so in
# its documentation, or limit its own session. Seen: the number of torch's threads is 1 after the import, for whatever is
# computed afterwards, on any number of cores, without a word.
#
# Output: before 4
#         after 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 torchaudio==2.11.0 numpy==2.4.6 silero-vad==6.2.3
cat > "$folder/threads.py" <<'P'
import torch

torch.set_num_threads(4)
print("before", torch.get_num_threads())
import silero_vad  # noqa: E402, F401

print("after", torch.get_num_threads())
P
cd "$folder"
venv/bin/python threads.py 2> log | tee output
sed -n 's/^# \(Output:\|       \) \([a-z]* [0-9]*\)$/\2/p' "$OLDPWD/$0" | diff - output
