#!/usr/bin/env bash
# soundfile 0.14.0 (libsndfile): a file in DWVW says that it is seekable, and every seek fails.
#
# Guess before the run: `seekable()` tells compressed formats apart: those that can be read only from the start (GSM
# 6.10, G.721, NMS ADPCM) say no, and where it says yes, seeking works.
# Seen: that holds for eight of nine formats. DWVW in AIFF says yes, and a seek within the file raises LibsndfileError:
# "Internal psf_fseek() failed." Reading from the start works. A reader of parts of files must try the seek.
#
# Output: WAV GSM610: seekable False, seek fails
#         WAV NMS_ADPCM_32: seekable False, seek fails
#         AU G721_32: seekable False, seek fails
#         AU G723_24: seekable False, seek fails
#         WAV MS_ADPCM: seekable True, seek works
#         WAV IMA_ADPCM: seekable True, seek works
#         FLAC PCM_16: seekable True, seek works
#         OGG VORBIS: seekable True, seek works
#         AIFF DWVW_16: seekable True, seek fails: code 39, Internal psf_fseek() failed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet soundfile==0.14.0 numpy==2.4.6
cat > "$folder/seek.py" <<'P'
import sys

import numpy
import soundfile

tone = 0.5 * numpy.sin(0.05 * numpy.arange(24000))
FORMATS = (
    "WAV GSM610", "WAV NMS_ADPCM_32", "AU G721_32", "AU G723_24", "WAV MS_ADPCM", "WAV IMA_ADPCM", "FLAC PCM_16",
    "OGG VORBIS", "AIFF DWVW_16",
)
for kind in FORMATS:
    container, coding = kind.split()
    path = f"{sys.argv[1]}/{coding}"
    soundfile.write(path, tone, 8000, format=container, subtype=coding)
    with soundfile.SoundFile(path) as file:
        seekable = file.seekable()
        try:
            file.seek(1000)
            result = "works"
        except soundfile.LibsndfileError as error:
            result = f"fails: code {error.code}, {error.error_string}" if seekable else "fails"
    print(f"{kind}: seekable {seekable}, seek {result}")
P
"$folder/venv/bin/python" "$folder/seek.py" "$folder" | tee "$folder/output"
sed -n 's/^# \(Output:\|       \) \([A-Z]* [A-Z_0-9]*: .*\)$/\2/p' "$0" | diff - "$folder/output"
