#!/usr/bin/env bash
# Makes the README's two pictures from the report of a run: `docs/make_pictures.sh [RUN]`, of the quickstart by default.
# Needs Debian's Chromium (apt-get install chromium) and the .venv of `make install`.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/quickstart/seed_0/oreal}
pictures=docs/pictures
page=$(mktemp -d)/report.html
trap 'rm -rf "$(dirname "$page")"' EXIT
PATH="$PWD/.venv/bin:$PATH"

picture() { # FILE ADDRESS HEIGHT: what a window of 1200 x HEIGHT shows at the page's address
  chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --force-color-profile=srgb --virtual-time-budget=20000 \
    --window-size="1200,$3" --screenshot="$PWD/$pictures/$1" "file://$page$2" 2>/dev/null
  # Few colours are enough, and a quarter of the bytes.
  python - "$pictures/$1" <<'PYTHON'
import sys
from PIL import Image

path = sys.argv[1]
Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
PYTHON
  echo "$pictures/$1: $(stat --format=%s "$pictures/$1") bytes"
}

mkdir -p "$pictures"
said=$(megatron-oreal report "$run" --out "$page" --json)
# The wrong answer in which q falls the most, of those in which it does so past the first tokens, where a mean is restless.
item=$(python -c 'import json, sys; print(json.load(sys.stdin)[0]["blamed"][0]["index_in_page"])' <<<"$said")
token=$(python -c 'import json, sys; print(json.load(sys.stdin)[0]["blamed"][0]["blamed"]["index"])' <<<"$said")
picture overview.png "#theme=light" 1260
picture tokens.png "#theme=light&view=tokens&item=$item&token=$token&stretch=1" 680
