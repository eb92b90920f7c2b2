"""A run whose names are what no web page wants: markup, quotes, line separators, emoji."""

import json
import shutil
from pathlib import Path

MARKUP = '<img src=x onerror="window.hacked=1">&amp;\'</script><script>window.hacked=2</script>'
GROUP = f"層 🎈 {MARKUP}"
FOLDER = "run <b>&amp; 枝刈り 🎈 'q' $x` {{ 7*7 }}"
NEW_NAMES = {"0": GROUP, "3": "b|a*r_[x](y)\u2028", "6": "6"}


def hostile_copy(finished: Path, parent: Path) -> Path:
    """Copy a finished run under odd names, groups and layers included."""
    run = Path(shutil.copytree(finished, parent / FOLDER))
    record = json.loads((run / "result.json").read_text())
    record |= {"model": f"my.nets:{MARKUP}", "data": "写真 <犬|猫> {x}", "command": f"psenet prune {MARKUP}"}
    for widths in ("widths", "uniform_widths", "searched_widths", "full_widths"):
        record[widths] = {NEW_NAMES[name]: width for name, width in record[widths].items()}
    for layer in record["layers"]:
        layer["name"] = NEW_NAMES.get(layer["name"], layer["name"])
    record["frozen"][0] |= {"reason": MARKUP}
    (run / "result.json").write_text(json.dumps(record), encoding="utf-8")

    candidates = json.loads((run / "stages/evaluated.json").read_text())
    for one in candidates["candidates"]:
        one["widths"] = {NEW_NAMES[name]: width for name, width in one["widths"].items()}
    # A front of all but one, whatever the training gave: costs that the slider tells apart, and scores that rise.
    for place, one in enumerate(candidates["candidates"]):
        one |= {
            "macs": round((0.2 + 0.07 * place) * record["baseline"]["macs"]),
            "score": 40.0 + place - 3 * (place == 2),
        }
    (run / "stages/evaluated.json").write_text(json.dumps(candidates), encoding="utf-8")

    prior = json.loads((run / "stages/prior.json").read_text())
    prior["groups"] = [NEW_NAMES[name] for name in prior["groups"]]
    (run / "stages/prior.json").write_text(json.dumps(prior), encoding="utf-8")

    curves = json.loads((run / "stages/curves.json").read_text())
    curves[MARKUP] = curves["baseline"]
    (run / "stages/curves.json").write_text(json.dumps(curves), encoding="utf-8")

    ranking = {"subnets": [{"widths": {}, "score": 50 + n, "accuracy_alone": 60 + n * n} for n in range(4)]}
    (run / "stages/ranking.json").write_text(json.dumps({**ranking, "tau": 1.0, "by_macs_tau": -0.25}))
    return run
