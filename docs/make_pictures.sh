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
  echo "$pictures/$1: $(stat --format=%s "$pictures/$1") bytes"
}

mkdir -p "$pictures"
said=$(megatron-oreal report "$run" --out "$page" --json)
# The wrong answer in which q falls the most, at the token where it does.
address=$(python -c '
import json, sys

blamed = json.load(sys.stdin)[0]["blamed"][0]
print("#theme=light&view=tokens&stretch=1&item={}&token={}".format(blamed["item"], blamed["blamed"]["index"]))
' <<<"$said")
picture overview.png "#theme=light" 1260
picture tokens.png "$address" 720
