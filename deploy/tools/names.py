"""Checks that what deploy/ uses exists: metrics of the dashboard and of the alert rules by the table of docs/metrics.md, flags and
their variables by the tables of docs/flags.md.

    names.py ROOT MANIFEST…     ROOT is the checkout; each MANIFEST is a file of Kubernetes objects
"""

import json
import pathlib
import re
import sys

import yaml

# What a query may contain beside metrics.
KEYWORDS = set(
    "abs absent and avg bool by count floor group_left group_right histogram_quantile ignoring increase le max max_over_time min "
    "offset on or predict_linear rate sum time topk unless up without".split()
)
PREFIXES = ("etcd", "metastore")


def table(root, page):
    """The names in the first column of the tables of a page of docs/."""
    rows = (root / "docs" / page).read_text().splitlines()
    return {name for row in rows for name in re.findall(r"^\| `-*([a-z0-9_-]+)` \|", row)}


def metrics_of(query):
    """The metrics that a query reads: its words, without selectors, strings, lists of labels, ranges and numbers."""
    query = re.sub(r'"[^"]*"', "", query)
    query = re.sub(r"\{[^}]*\}|\[[^]]*\]", " ", query)
    query = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", " ", query)
    words = set(re.findall(r"[A-Za-z_:][A-Za-z0-9_:]*", query))
    return words - KEYWORDS


def panels(dashboard):
    """The panels of a dashboard that have queries, each with the title of its row."""
    row = ""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        else:
            yield row, panel


def unknown_metrics(root, queries):
    known = table(root, "metrics.md")
    for where, query in queries:
        for name in sorted(metrics_of(query)):
            if re.sub(r"_(bucket|sum|count)$", "", name) not in known and name not in known:
                yield f"{where}: no metric is called {name} (docs/metrics.md)"


def containers(document):
    """The containers of a Kubernetes object that run the server."""
    spec = (document or {}).get("spec", {})
    spec = spec.get("template", {}).get("spec", spec)
    for container in spec.get("containers", []):
        if container.get("command", [""])[0] in PREFIXES:
            yield container


def flags_used(root, manifests):
    """Everything in deploy/ that sets a flag: where, and the flag."""
    for manifest in manifests:
        for document in yaml.load_all(pathlib.Path(manifest).read_text(), yaml.CSafeLoader):
            for container in containers(document):
                for argument in container["command"][1:] + container.get("args", []):
                    yield manifest, argument.split("=")[0].lstrip("-")
    for file in ("compose/compose.yaml", "systemd/metastore.env"):
        for variable in re.findall(r"\bETCD_([A-Z_]+)[:=]", (root / "deploy" / file).read_text()):
            yield file, variable.lower().replace("_", "-")
    for flag in re.findall(r"--([a-z-]+)=http|--(data-dir)=", (root / "deploy/Dockerfile").read_text()):
        yield "Dockerfile", "".join(flag)


def main():
    root, manifests = pathlib.Path(sys.argv[1]), sys.argv[2:]
    dashboard = json.loads((root / "deploy/monitoring/dashboard.json").read_text())
    rules = yaml.safe_load((root / "deploy/monitoring/alerts.yaml").read_text())
    queries = [(f"dashboard, {p['title']}", t["expr"]) for _, p in panels(dashboard) for t in p["targets"]]
    queries += [(f"alert {r['alert']}", r["expr"]) for g in rules["groups"] for r in g["rules"]]
    known = table(root, "flags.md")
    used = list(flags_used(root, manifests))
    errors = list(unknown_metrics(root, queries))
    errors += [f"{where}: there is no flag --{flag} (docs/flags.md)" for where, flag in used if flag not in known]
    tests = yaml.safe_load((root / "deploy/monitoring/alerts_test.yaml").read_text())["tests"]
    tested = {t["alertname"] for test in tests for t in test["alert_rule_test"] if t.get("exp_alerts")}
    errors += [f"alert {r['alert']}: no test has it fire" for g in rules["groups"] for r in g["rules"] if r["alert"] not in tested]
    print(*errors, sep="\n", end="\n" if errors else "")
    # An empty list would mean that nothing was found to check.
    if errors or len(queries) < 50 or len(used) < 50:
        sys.exit(f"{len(errors)} errors in {len(queries)} queries and {len(used)} flags")


if __name__ == "__main__":
    main()
