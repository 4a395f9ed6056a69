#!/usr/bin/env bash
# pysubs2 1.8.1: a number on the last line of a subtitle's text is dropped, and a WebVTT comment becomes text.
#
# Guess before the run: only the numbers that count the subtitles are dropped, those above the lines with the times, and
# NOTE blocks are skipped, as the WebVTT standard says. Seen: whatever number is the last line of a text is taken for the
# number of the next subtitle, also in WebVTT, where subtitles need no numbers; the last subtitle of a file loses it only
# where nothing follows. A comment is appended to the text before it.
#
# Output: srt Room 5 | The year is
#         vtt In the year | Hello
#         note Hello NOTE cut here | Goodbye
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pysubs2==1.8.1
cat > "$folder/read.py" <<'P'
import pysubs2

FILES = {
    "srt": "1\n00:00:01,000 --> 00:00:02,000\nRoom\n5\n\n2\n00:00:03,000 --> 00:00:04,000\nThe year is\n1984\n",
    "vtt": "WEBVTT\n\n00:01.000 --> 00:02.000\nIn the year\n1984\n\n00:03.000 --> 00:04.000\nHello\n",
    "note": "WEBVTT\n\n00:01.000 --> 00:02.000\nHello\n\nNOTE cut here\n\n00:03.000 --> 00:04.000\nGoodbye\n",
}
for name, text in FILES.items():
    events = pysubs2.SSAFile.from_string(text, "srt" if name == "srt" else "vtt")
    print(name, " | ".join(" ".join(event.plaintext.split()) for event in events))
P
cd "$folder"
venv/bin/python read.py | tee output
sed -n 's/^# \(Output:\|       \) \([a-z]* [A-Z].*\)$/\2/p' "$OLDPWD/$0" | diff - output
