#!/usr/bin/env bash
# soundfile 0.14.0 (libsndfile 1.2.2): the same floats are other 16-bit samples in a WAV file than in a FLAC file.
#
# Guess before the run: both round to the nearest integer, so that a lossless copy in either format is the same audio, with
# the same hash. Seen: FLAC rounds x * 32768 to the nearest integer; WAV rounds it down, so half of the samples are one
# lower. Integers are written alike by both.
#
# Output: WAV floor 1.00 nearest 0.50
#         FLAC floor 0.50 nearest 1.00
#         integers equal
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet soundfile==0.14.0 numpy==2.4.6
cat > "$folder/write.py" <<'P'
import io

import numpy as np
import soundfile


def written(audio, name):
    file = io.BytesIO()
    soundfile.write(file, audio, 24000, "PCM_16", format=name)
    file.seek(0)
    return soundfile.read(file, dtype="int16")[0]


audio = 0.2 * np.random.default_rng(0).standard_normal(24000)
for name in ("WAV", "FLAC"):
    found = written(audio, name)
    shares = [(found == rounded(audio * 32768)).mean() for rounded in (np.floor, np.rint)]
    print("{} floor {:.2f} nearest {:.2f}".format(name, *shares))
integers = (audio * 32768).astype(np.int16)
print("integers", "equal" if (written(integers, "WAV") == written(integers, "FLAC")).all() else "differ")
P
cd "$folder"
venv/bin/python write.py | tee output
sed -n 's/^# \(Output:\|       \) \(\(WAV\|FLAC\|integers\) .*\)$/\2/p' "$OLDPWD/$0" | diff - output
