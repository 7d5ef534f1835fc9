"""Write the JSON schema of zone files to docs/zones.schema.json. Run with `python scripts/zone_schema.py`."""

import json
from pathlib import Path

from moondream_cv.video import Zones

TARGET = Path(__file__).parents[1] / "docs" / "zones.schema.json"

if __name__ == "__main__":
    TARGET.write_text(json.dumps(Zones.json_schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {TARGET}")
