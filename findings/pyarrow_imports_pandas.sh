#!/usr/bin/env bash
# pyarrow 25.0.1 beside pandas 3.1.1: reading an integer column as numpy, or making an array of a list, imports pandas.
#
# Guess before the run: pandas is imported only by methods that name it, such as to_pandas.
# Seen: `pa.array([1])` imports all of pandas if it is installed, a few tenths of a second in a command that never uses
# it. So does `to_numpy` of a column that was read from a file; `numpy.from_dlpack` of the same column does not.
#
# Output: from_dlpack: False
#         to_numpy: True
#         array: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pyarrow==25.0.1 pandas==3.1.1
cat > "$folder/look.py" <<'P'
import sys
import numpy
import pyarrow as pa

what, path = sys.argv[1:]
if what == "write":
    table = pa.table({"n": [1, 2, 3]})
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    sys.exit()
if what == "array":
    pa.array([1])
else:
    column = pa.ipc.open_file(pa.memory_map(path)).read_all()["n"].combine_chunks()
    numpy.from_dlpack(column) if what == "from_dlpack" else column.to_numpy()
print(f"{what}: {'pandas' in sys.modules}")
P
"$folder/venv/bin/python" "$folder/look.py" write "$folder/n.arrow"
output=$(for what in from_dlpack to_numpy array; do "$folder/venv/bin/python" "$folder/look.py" "$what" "$folder/n.arrow"; done)
echo "$output"
[[ $output == $'from_dlpack: False\nto_numpy: True\narray: True' ]]
