"""Starts what deploy/ describes, in namespaces of its own, and checks that it works. Started by scripts/check-deploy --live, within
`unshare --user --map-root-user --net --mount --pid --fork --kill-child`: everything ends with this process.

    live.py ROOT WORK METASTORE PROMETHEUS ETCDCTL MIXIN

1. The three members of the compose file, each in a network namespace of its own, with their names, variables and certificates; what
   the paths in the containers are becomes a directory of WORK. The Helm chart's job turns authentication on.
2. Prometheus with the configuration of the compose file, with our alert rules, and etcd's (from its module, in MIXIN). While clients
   write, watch and hold leases, every panel of the dashboard has to be answered, every rule has to be evaluated, and every metric
   that etcd's rules and dashboards name has to exist. No alert may fire.
3. The arguments of the kubeadm manifest, as they are, with certificates at the places where kubeadm puts them; its probes.
"""

import json
import math
import os
import pathlib
import re
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import _gojsonnet
import yaml

import names

ROOT, WORK, METASTORE, PROMETHEUS, ETCDCTL, MIXIN = (pathlib.Path(argument) for argument in sys.argv[1:7])
MEMBERS = {"m1": "10.99.0.1", "m2": "10.99.0.2", "m3": "10.99.0.3"}
JOB = "metastore-etcd"
PASSWORD = 'a "quoted" \\ password'
SECONDS = 240


def run(*command, **options):
    subprocess.run([str(word) for word in command], check=True, **options)


def eventually(what, check):
    """Waits until `check` returns without an error, and returns what it returned."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            return check()
        except (AssertionError, OSError) as error:
            if time.monotonic() > end:
                sys.exit(f"live: {what}: {error}")
        time.sleep(0.5)


def get(url, **options):
    with urllib.request.urlopen(url, timeout=10, **options) as response:
        return response.read().decode()


def start(command, log, **options):
    # Not closed: the process writes to it until the end.
    return subprocess.Popen([str(word) for word in command], stdout=open(log, "w"), stderr=subprocess.STDOUT, **options)


def make_network():
    """A bridge with an address of ours, and a namespace behind it for each member. Names are resolved as compose would."""
    (WORK / "netns").mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", "/run")
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "br0", "type", "bridge")
    run("ip", "address", "add", "10.99.0.254/24", "dev", "br0")
    run("ip", "link", "set", "br0", "up")
    for member, address in MEMBERS.items():
        run("ip", "netns", "add", member)
        run("ip", "link", "add", f"to-{member}", "type", "veth", "peer", "name", "eth0", "netns", member)
        run("ip", "link", "set", f"to-{member}", "master", "br0", "up")
        run("ip", "-n", member, "address", "add", f"{address}/24", "dev", "eth0")
        run("ip", "-n", member, "link", "set", "eth0", "up")
        run("ip", "-n", member, "link", "set", "lo", "up")
    hosts = "127.0.0.1 localhost\n" + "".join(f"{address} {member}\n" for member, address in MEMBERS.items())
    (WORK / "hosts").write_text(hosts)
    run("mount", "--bind", WORK / "hosts", "/etc/hosts")


def certificate(directory, *words):
    run(ROOT / "deploy/make-certificates", directory, *words)


def start_members(compose):
    certificates = WORK / "certificates"
    for member in MEMBERS:
        certificate(certificates, "member", member, member, "localhost", "127.0.0.1")
    certificate(certificates, "client", "root")
    for member in MEMBERS:
        service = compose["services"][member]
        # What the containers see at their mount points.
        places = {"/var/lib/metastore": str(WORK / member)}
        for volume in service["volumes"]:
            source, target = volume.split(":")[:2]
            if source.startswith("./certificates/"):
                places[target] = str(certificates / source.removeprefix("./certificates/"))
        # etcd's alert on slow calls needs the histogram of calls.
        variables = service["environment"] | {"ETCD_METRICS": "extensive"}
        environment = {name: places.get(value, value) for name, value in variables.items()}
        assert service["command"] == ["metastore"], service["command"]
        start(["nsenter", f"--net=/run/netns/{member}", METASTORE], WORK / f"{member}.log", env=environment)


def etcdctl(member, *words, user="root"):
    """The command of a client of a member. Its certificate names the user."""
    certificates = WORK / "certificates"
    command = [ETCDCTL, f"--endpoints=https://{member}:2379", f"--cacert={certificates}/ca.crt"]
    command += [f"--cert={certificates}/{user}.crt", f"--key={certificates}/{user}.key", *words]
    return [str(word) for word in command]


def enable_auth():
    """Runs the script of the chart's job twice: the second time it finds that nothing is left to do."""
    secrets = WORK / "secrets"
    for place, files in {"ca": {"ca.crt": "ca.crt"}, "client": {"tls.crt": "root.crt", "tls.key": "root.key"}}.items():
        (secrets / place).mkdir(parents=True)
        for name, source in files.items():
            (secrets / place / name).write_text((WORK / "certificates" / source).read_text())
    (WORK / "password").write_text(PASSWORD)
    script = ROOT / "deploy/helm/metastore/files/enable-auth.sh"
    environment = {"PATH": os.environ["PATH"], "SECRETS": str(secrets), "ENDPOINT": "https://m2:2379", "TLS": "true"}
    environment["PASSWORD_FILE"] = str(WORK / "password")
    for answer in ("authentication is on; ", "authentication is on already"):
        output = subprocess.run(["sh", script], env=environment, capture_output=True, text=True)
        assert output.returncode == 0 and output.stdout.startswith(answer), output
    certificate(WORK / "certificates", "client", "stranger")
    refused = subprocess.run(etcdctl("m1", "get", "a", user="stranger"), capture_output=True, text=True)
    assert refused.returncode != 0 and "permission denied" in refused.stderr, refused


def load():
    """Writes, reads, watches and keeps leases through all members, for ever."""
    for member in MEMBERS:
        start(etcdctl(member, "watch", "--prefix", "key"), WORK / f"watch-{member}.log")
    for i in range(10**9):
        member = list(MEMBERS)[i % len(MEMBERS)]
        run(*etcdctl(member, "put", f"key{i % 1000}", "value"), stdout=subprocess.DEVNULL)
        run(*etcdctl(member, "get", f"key{i % 1000}"), stdout=subprocess.DEVNULL)
        granted = subprocess.run(etcdctl(member, "lease", "grant", "60"), capture_output=True, text=True, check=True)
        run(*etcdctl(member, "lease", "revoke", granted.stdout.split()[1]), stdout=subprocess.DEVNULL)


def etcd_rules():
    """etcd's own alert rules, as a file for Prometheus, and what its rules and dashboards name."""
    rules = _gojsonnet.evaluate_snippet("rules", f'(import "{MIXIN}/mixin.libsonnet").prometheusAlerts')
    (WORK / "manifests").mkdir()
    (WORK / "manifests/etcd-prometheusRules.yaml").write_text(rules)
    used = set()
    for group in json.loads(rules)["groups"]:
        for rule in group["rules"]:
            used |= names.metrics_of(rule["expr"])
    for file in (MIXIN / "dashboards").glob("*.libsonnet"):
        used |= set(re.findall(r"\b(?:etcd_(?:disk|mvcc|network|server|debugging)|grpc_server|process)_[a-z_]+\b", file.read_text()))
    return WORK / "manifests/etcd-prometheusRules.yaml", used - {"etcd_server"}


def start_prometheus(rules):
    configuration = yaml.safe_load((ROOT / "deploy/compose/prometheus.yaml").read_text())
    configuration["rule_files"] = [str(ROOT / "deploy/monitoring/alerts.yaml"), str(rules)]
    (WORK / "prometheus.yaml").write_text(json.dumps(configuration))
    command = [PROMETHEUS, f"--config.file={WORK}/prometheus.yaml", f"--storage.tsdb.path={WORK}/prometheus"]
    start([*command, "--web.listen-address=127.0.0.1:9090"], WORK / "prometheus.log")


def ask(path, **parameters):
    answer = json.loads(get(f"http://127.0.0.1:9090/api/v1/{path}?{urllib.parse.urlencode(parameters)}"))
    assert answer["status"] == "success", answer
    return answer["data"]


def query(expression):
    for variable, value in {"$job": JOB, "$instance": ".*", "$__rate_interval": "1m"}.items():
        expression = expression.replace(variable, value)
    return [float(series["value"][1]) for series in ask("query", query=expression)["result"]]


def check_panels():
    """Every query of every panel is answered with figures, apart from those that list problems."""
    dashboard = json.loads((ROOT / "deploy/monitoring/dashboard.json").read_text())
    unanswered, answered, problems = [], 0, 0
    for row, panel in names.panels(dashboard):
        for target in panel["targets"]:
            figures = query(target["expr"])
            if row.startswith("Problems"):
                problems += 1
            elif any(not math.isnan(figure) for figure in figures):
                answered += 1
            else:
                unanswered.append(f"{panel['title']}: {target['expr']}")
    assert not unanswered, "panels without figures:\n" + "\n".join(unanswered)
    return answered, problems


def check_rules():
    groups = ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    wrong = [f"{rule['name']}: {rule['health']} {rule.get('lastError', '')}" for rule in rules if rule["health"] != "ok"]
    assert not wrong, "\n".join(wrong)
    firing = [alert for alert in ask("alerts")["alerts"] if alert["state"] == "firing"]
    if firing:
        sys.exit(f"live: alerts fire: {firing}")
    return len(rules)


def check_names(used):
    missing = sorted(used - set(ask("label/__name__/values")))
    assert not missing, f"etcd's rules and dashboards name what is not here: {missing}"
    return len(used)


def start_kubeadm():
    """Starts the pod's command as it is, over directories at the places that it names."""
    pod = yaml.safe_load((ROOT / "deploy/kubernetes/kubeadm/etcd.yaml").read_text())
    container = pod["spec"]["containers"][0]
    for place in ("/etc", "/var/lib", "/usr/local/bin"):
        layers = WORK / "layers" / place.strip("/").replace("/", "-")
        (layers / "upper").mkdir(parents=True)
        (layers / "work").mkdir()
        options = f"lowerdir={place},upperdir={layers}/upper,workdir={layers}/work"
        run("mount", "-t", "overlay", "overlay", "-o", options, place)
    os.makedirs("/var/lib/etcd", mode=0o700, exist_ok=True)
    pathlib.Path("/usr/local/bin/etcd").symlink_to(METASTORE)
    run("ip", "address", "add", "192.0.2.10/32", "dev", "lo")
    certificates = "/etc/kubernetes/pki/etcd"
    for name in ("server", "peer"):
        certificate(certificates, "member", name, "control-plane-1", "localhost", "127.0.0.1", "192.0.2.10")
    certificate(certificates, "client", "healthcheck-client")
    server = start(container["command"], WORK / "kubeadm.log", env={"PATH": "/usr/local/bin:/usr/bin:/bin"})
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = container[probe]["httpGet"]
        assert path["scheme"] == "HTTP"
        url = f"http://{path['host']}:{path['port']}{path['path']}"
        assert eventually(f"{probe} of the kubeadm manifest", lambda url=url: get(url)) == "ok\n"
        assert server.poll() is None, "the server has ended"
    context = ssl.create_default_context(cafile=f"{certificates}/ca.crt")
    context.load_cert_chain(f"{certificates}/healthcheck-client.crt", f"{certificates}/healthcheck-client.key")
    for host in ("127.0.0.1", "192.0.2.10"):
        assert json.loads(get(f"https://{host}:2379/version", context=context))["etcdserver"].startswith("3.7.")
    try:
        get("https://127.0.0.1:2379/version", context=ssl.create_default_context(cafile=f"{certificates}/ca.crt"))
        sys.exit("live: a client without a certificate was served")
    except OSError:
        pass
    server.terminate()
    assert server.wait(30) in (0, -15), server.returncode


def main():
    compose = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text())
    make_network()
    start_members(compose)
    for member in MEMBERS:
        assert eventually(f"{member} is not ready", lambda member=member: get(f"http://{member}:2381/readyz")) == "ok\n"
    print("compose: three members with TLS are ready", flush=True)
    enable_auth()
    print("chart: its job has turned authentication on", flush=True)
    threading.Thread(target=load, daemon=True).start()
    rules, used = etcd_rules()
    start_prometheus(rules)
    answered, problems = eventually("the dashboard", check_panels)
    print(f"dashboard: {answered} queries are answered, and {problems} list problems", flush=True)
    print(f"alerts: {eventually('the alert rules', check_rules)} rules, ours and etcd's, are evaluated; none fires", flush=True)
    print(f"etcd's rules and dashboards: all {eventually('metrics', lambda: check_names(used))} metrics exist", flush=True)
    start_kubeadm()
    print("kubeadm: the manifest's arguments start a member, its probes succeed, clients need certificates", flush=True)


if __name__ == "__main__":
    main()
