"""Drives etcd3gw, the Python client of etcd's JSON API, against one server: python_client.py HOST PORT.

Prints "all as expected", or raises what was not. Runs against a real etcd as well, which shows that it expects etcd's behaviour.
"""

import sys
import time
import threading

import etcd3gw
from etcd3gw.exceptions import Etcd3Exception, WatchTimedOut


def expect(got, wanted):
    assert got == wanted, f"{got!r} and not {wanted!r}"


def keys(client):
    expect(client.get("missing"), [])
    expect(client.put("a", "one"), True)
    expect(client.put(b"\x00\xff", b"\xfe\x00"), True)
    expect(client.get("a"), [b"one"])
    expect(client.get(b"\x00\xff"), [b"\xfe\x00"])
    (value, metadata), = client.get("a", metadata=True)
    expect((value, metadata["key"], metadata["version"]), (b"one", b"a", "1"))
    expect(client.create("a", "two"), False)
    expect(client.create("b", "two"), True)
    expect(client.replace("a", "wrong", "three"), False)
    expect(client.replace("a", "one", "three"), True)
    expect(client.get("a"), [b"three"])
    for number in range(30):
        client.put(f"list/{number:02}", str(number))
    listed = client.get_prefix("list/", sort_order="descend", sort_target="key")
    expect([value for value, _ in listed][:3], [b"29", b"28", b"27"])
    expect(len(client.get_all()), 33)
    expect(client.delete("a"), True)
    expect(client.delete("a"), False)
    expect(client.delete_prefix("list/"), True)
    expect(client.get_prefix("list/"), [])


def transactions(client):
    encoded = "dHhu"  # txn
    swap = {
        "compare": [{"key": encoded, "result": "EQUAL", "target": "VERSION", "version": 0}],
        "success": [{"request_put": {"key": encoded, "value": encoded}}],
        "failure": [{"request_range": {"key": encoded}}],
    }
    expect(client.transaction(swap)["succeeded"], True)
    second = client.transaction(swap)
    expect(second.get("succeeded", False), False)
    expect(second["responses"][0]["response_range"]["kvs"][0]["value"], encoded)


def leases(client):
    lease = client.lease(ttl=60)
    client.put("leased", "x", lease=lease)
    expect(lease.keys(), [b"leased"])
    assert 50 < lease.ttl() <= 60, lease.ttl()
    expect(lease.refresh(), 60)
    expect(lease.revoke(), True)
    expect(client.get("leased"), [])
    short = client.lease(ttl=1)
    client.put("leased", "x", lease=short)
    deadline = time.monotonic() + 30
    while client.get("leased"):
        assert time.monotonic() < deadline, "the lease does not end"
        time.sleep(0.1)


def locks(client):
    with client.lock("name", ttl=30) as lock:
        expect(lock.is_acquired(), True)
        expect(client.lock("name", ttl=30).acquire(), False)
        expect(lock.refresh(), 30)
    expect(client.lock("name", ttl=30).acquire(), True)


def watches(client):
    events, cancel = client.watch_prefix("w/")
    once = {}
    waiting = threading.Thread(target=lambda: once.update(client.watch_once("once", timeout=30)))
    waiting.start()
    deadline = time.monotonic() + 30
    # The library does not say when a watch has begun, so a key is put until it is noticed.
    while waiting.is_alive():
        assert time.monotonic() < deadline, "no event"
        client.put("once", "x")
        time.sleep(0.1)
    expect((once["kv"]["key"], once["kv"]["value"]), (b"once", b"x"))
    revision = int(client.status()["header"]["revision"])
    client.put("w/1", "x")
    client.delete("w/1")
    past, cancel_past = client.watch("w/1", start_revision=revision + 1, prev_kv=True)
    for stream in (past, events):
        put, deleted = next(stream), next(stream)
        expect((put["kv"]["key"], put["kv"]["value"], put.get("type")), (b"w/1", b"x", None))
        expect((deleted["kv"]["key"], deleted["type"]), (b"w/1", "DELETE"))
    cancel()
    cancel_past()
    try:
        client.watch_once("nothing", timeout=0.5)
        raise AssertionError("an event of a key that nobody puts")
    except WatchTimedOut:
        pass


def the_rest(client):
    status, members = client.status(), client.members()
    assert int(status["dbSize"]) > 0 and status["version"].startswith("3."), status
    expect(len(members), 1)
    expect(status["leader"], members[0]["ID"])
    for wrong in ({"value": "eA=="}, {"key": "!"}, {"key": "eA==", "value": 5}):
        try:
            client.post(client.get_url("/kv/put"), json=wrong)
            raise AssertionError(f"{wrong} was accepted")
        except Etcd3Exception:
            pass


def main():
    client = etcd3gw.client(host=sys.argv[1], port=int(sys.argv[2]), api_path="/v3/", timeout=60)
    for check in (keys, transactions, leases, locks, watches, the_rest):
        check(client)
    discovered = etcd3gw.client(host=sys.argv[1], port=int(sys.argv[2]))
    expect(discovered.put("discovered", discovered.api_path), True)
    print("all as expected")


main()
