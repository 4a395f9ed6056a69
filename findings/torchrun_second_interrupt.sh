#!/usr/bin/env bash
# torch 2.11.0: torchrun passes on a first Ctrl-C as SIGINT, and a second one as SIGTERM.
#
# Guess before the run: ranks are in the terminal's process group and get every Ctrl-C themselves, or torchrun passes each
# of them on unchanged, so that "press Ctrl-C again to stop at once" works as it does without a launcher.
# Seen: ranks are in sessions of their own. torchrun passes the first SIGINT on and waits up to 30 s for the ranks to end.
# The second one interrupts this waiting, in which torchrun then sends SIGTERM, and waits again. A program that counts
# SIGINT never sees the second one.
#
# Output: session of its own, then SIGINT, SIGTERM
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6
cat > "$folder/rank.py" <<'P'
import os
import signal
import time

own = "session of its own" if os.getsid(0) != os.getsid(os.getppid()) else "the launcher's session"
received = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda got, frame: received.append(signal.Signals(got).name))
open("ready", "w").close()
deadline = time.monotonic() + 60
while len(received) < 2 and time.monotonic() < deadline:
    time.sleep(0.05)
with open("output", "w") as file:
    print(f"{own}, then {', '.join(received)}", file=file)
P
cat > "$folder/interrupt.py" <<'P'
import os
import pathlib
import signal
import subprocess
import sys
import time

command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "rank.py"]
launcher = subprocess.Popen(command, start_new_session=True)  # a group of its own, as a terminal's foreground has
while not pathlib.Path("ready").exists():
    time.sleep(0.1)
for _ in range(2):  # what a terminal does at Ctrl-C
    os.killpg(launcher.pid, signal.SIGINT)
    time.sleep(1.5)
launcher.wait(60)
P
cd "$folder"
venv/bin/python interrupt.py > log 2>&1
cat output
sed -n 's/^# Output: //p' "$OLDPWD/$0" | diff - output
