//! Hashes of the key space, which all members must agree on, metastore and etcd alike.

use etcd_client::{Client, CompactionOptions, DeleteOptions};
use metastore::proto::etcdserverpb::{HashKvRequest, HashRequest, PutRequest};

use crate::support::Server;

/// Puts between two compactions, minus one.
const CYCLE: i64 = 71;
/// Puts after the last of these compactions, and the least number of puts before it.
const MANY: i64 = 1210;

/// KV-8 and KV-15 over the wire; the golden script `mvcc/hash` shows every step.
#[tokio::test]
async fn hashes_equal_etcds() {
    let mut server = Server::start(&[]);
    let mut kv = server.kv().await;
    let mut maintenance = server.maintenance().await;
    for value in ["bar", "baz"] {
        let put = PutRequest { key: "foo".into(), value: value.into(), ..PutRequest::default() };
        kv.put(put).await.unwrap();
    }
    for (revision, hash, hash_revision) in [(0, 2_020_292_994, 3), (2, 3_305_255_506, 2), (1, 1_084_519_789, 1)] {
        let answer = maintenance.hash_kv(HashKvRequest { revision }).await.unwrap().into_inner();
        assert_eq!((answer.hash, answer.hash_revision, answer.compact_revision), (hash, hash_revision, -1));
        assert_eq!(answer.header.unwrap().revision, 3);
    }
    let before = maintenance.hash(HashRequest {}).await.unwrap().into_inner();
    assert_eq!(before.header.unwrap().revision, 3);
    server.stop();
    server.restart();
    let after = server.maintenance().await.hash(HashRequest {}).await.unwrap().into_inner();
    assert_eq!(after.hash, before.hash, "a restart changes nothing");
}

/// Seven keys in turn, and occasionally one of two others.
fn key(nth: i64) -> &'static str {
    match (nth % (2 * CYCLE), nth % CYCLE) {
        (30, _) => "zenek",
        (_, 30) => "xavery",
        _ => ["alice", "bob", "celine", "dominik", "eve", "frederica", "gorge"][usize::try_from(nth % 7).unwrap()],
    }
}

/// Puts `count + 1` values, numbered from `first`, hashes at `revision` (zero: the current one), then compacts there. Returns
/// the hash, the previous compact revision and the hashed revision.
async fn hash_and_compact(client: &mut Client, first: i64, count: i64, revision: i64) -> (u32, i64, i64) {
    for nth in first..=first + count {
        client.put(key(nth), nth.to_string(), None).await.unwrap();
    }
    let answer = client.hash_kv(revision).await.unwrap();
    client.compact(answer.hash_revision(), None).await.unwrap();
    (answer.hash(), answer.compact_version(), answer.hash_revision())
}

/// A history of many such cycles. `at` maps the first number and the length of a cycle to the revision that is hashed.
async fn history(at: impl Fn(i64, i64) -> i64) -> Vec<(u32, i64, i64)> {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    let (mut hashes, mut first) = (Vec::new(), 0);
    while first < MANY {
        hashes.push(hash_and_compact(&mut client, first, CYCLE, at(first, CYCLE)).await);
        first += CYCLE;
    }
    hashes.push(hash_and_compact(&mut client, first, MANY, at(first, MANY)).await);
    hashes
}

/// The numbers that etcd's own tests expect (`TestHashByRevValue`).
#[tokio::test]
async fn hashes_in_the_middle_of_a_history_equal_etcds() {
    let expected = [
        (4_082_599_214, -1, 35),
        (2_279_933_401, 35, 106),
        (3_284_231_217, 106, 177),
        (126_286_495, 177, 248),
        (900_108_730, 248, 319),
        (2_475_485_232, 319, 390),
        (1_226_296_507, 390, 461),
        (2_503_661_030, 461, 532),
        (4_155_130_747, 532, 603),
        (106_915_399, 603, 674),
        (406_914_006, 674, 745),
        (1_882_211_381, 745, 816),
        (806_177_088, 816, 887),
        (664_311_366, 887, 958),
        (1_496_914_449, 958, 1029),
        (2_434_525_091, 1029, 1100),
        (3_988_652_253, 1100, 1171),
        (1_122_462_288, 1171, 1242),
        (724_436_716, 1242, 1883),
    ];
    assert_eq!(history(|first, count| first + count / 2).await, expected);
}

/// The same at the end of a history (`TestHashByRevValueLastRevision`).
#[tokio::test]
async fn hashes_at_the_end_of_a_history_equal_etcds() {
    let expected = [
        (1_913_897_190, -1, 73),
        (224_860_069, 73, 145),
        (1_565_167_519, 145, 217),
        (1_566_261_620, 217, 289),
        (2_037_173_024, 289, 361),
        (691_659_396, 361, 433),
        (2_713_730_748, 433, 505),
        (3_919_322_507, 505, 577),
        (769_967_540, 577, 649),
        (2_909_194_793, 649, 721),
        (1_576_921_157, 721, 793),
        (4_067_701_532, 793, 865),
        (2_226_384_237, 865, 937),
        (2_923_408_134, 937, 1009),
        (2_680_329_256, 1009, 1081),
        (1_546_717_673, 1081, 1153),
        (2_713_657_846, 1153, 1225),
        (1_046_575_299, 1225, 1297),
        (2_017_735_779, 1297, 2508),
    ];
    assert_eq!(history(|_, _| 0).await, expected);
}

/// The hash at a revision, the compact revision and the hashed revision.
async fn hash_at(server: &Server, revision: i64) -> (u32, i64, i64) {
    let answer = server.maintenance().await.hash_kv(HashKvRequest { revision }).await.unwrap().into_inner();
    (answer.hash, answer.compact_revision, answer.hash_revision)
}

/// Like etcd's `TestCompactionHash`, with puts and deletions at the compacted revisions.
#[tokio::test]
async fn compaction_and_defragmentation_do_not_change_the_hash_at_their_revision() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    let mut compacted = -1;
    for cycle in 0..12_i64 {
        for nth in 0..40 {
            client.put(format!("{}", (cycle * 40 + nth) % 17), nth.to_string(), None).await.unwrap();
        }
        if cycle % 3 == 1 {
            client.delete(format!("{}", cycle % 17), None).await.unwrap();
        }
        if cycle == 11 {
            client.delete("", Some(DeleteOptions::new().with_all_keys())).await.unwrap();
            // If no key is left at the compacted revision itself, etcd's two hashes differ, and so do ours.
            client.put("alone", "1", None).await.unwrap();
        }
        let before = hash_at(&server, 0).await;
        let revision = before.2;
        assert_eq!(before.1, compacted);
        client.put("later", cycle.to_string(), None).await.unwrap();
        assert_eq!(hash_at(&server, revision).await, before);
        client.compact(revision, Some(CompactionOptions::new().with_physical())).await.unwrap();
        assert_eq!(hash_at(&server, revision).await, before, "after compaction {cycle}");
        client.defragment().await.unwrap();
        assert_eq!(hash_at(&server, revision).await, before, "after defragmentation {cycle}");
        compacted = revision;
    }
    assert_eq!(stored_and_skipped(&server), ["12", "0"]);
}

/// Consecutive compactions are done one by one, and the hash of each is stored.
#[tokio::test]
async fn the_hashes_of_consecutive_compactions_are_all_stored() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    for nth in 0..2000 {
        client.put(format!("{}", nth % 300), nth.to_string(), None).await.unwrap();
    }
    for revision in [500, 900, 1300, 1700] {
        client.compact(revision, None).await.unwrap();
    }
    client.compact(1900, Some(CompactionOptions::new().with_physical())).await.unwrap();
    let mut previous = -1;
    for revision in [500, 900, 1300, 1700, 1900] {
        let (_, compacted, hashed) = hash_at(&server, revision).await;
        assert_eq!((compacted, hashed), (previous, revision));
        previous = revision;
    }
}

/// The number of compactions whose hashes are stored, and of those whose hashes were not computed.
fn stored_and_skipped(server: &Server) -> [String; 2] {
    let metrics = server.http("GET", "/metrics").body;
    ["remembered", "left_out"].map(|outcome| {
        let start = format!("metastore_compaction_hashes_total{{outcome=\"{outcome}\"}} ");
        metrics.lines().find_map(|line| line.strip_prefix(&start)).expect("the metric exists from the start").to_owned()
    })
}

/// A compaction does not hash more than 64 MiB of history unless the feature gate is enabled.
#[tokio::test]
async fn a_compaction_of_a_large_history_stores_no_hash() {
    const MIB: f64 = 1_048_576.0;
    for (flags, forced) in [(&[][..], false), (&["--feature-gates=CompactHashCheck=true"][..], true)] {
        let server = Server::start(flags);
        let mut client = server.client().await;
        for _ in 0..65 {
            client.put("large", vec![b'x'; 1 << 20], None).await.unwrap();
        }
        let history_bytes = || server.http("GET", "/metrics").metric("metastore_history_bytes");
        assert!(history_bytes() > 65.0 * MIB);
        let before = hash_at(&server, 0).await;
        client.compact(66, Some(CompactionOptions::new().with_physical())).await.unwrap();
        let after = hash_at(&server, 66).await;
        if forced {
            assert_eq!((after, stored_and_skipped(&server)), (before, ["1".to_owned(), "0".to_owned()]));
        } else {
            assert_eq!((after.1, after.2), (66, 66), "computed again, with the new compact revision");
            assert_eq!(stored_and_skipped(&server), ["0", "1"]);
            let line = server.wait_for_log("is not remembered by its hash");
            assert!(line.contains("\"compact-revision\":66") && line.contains("\"limit-bytes\":67108864"), "{line}");
        }
        // One value is left, and the next compaction is an ordinary one.
        assert!(history_bytes() > MIB && history_bytes() < 1.1 * MIB);
        client.put("small", "x", None).await.unwrap();
        let before = hash_at(&server, 67).await;
        client.compact(67, Some(CompactionOptions::new().with_physical())).await.unwrap();
        assert_eq!((before.1, hash_at(&server, 67).await), (66, before));
    }
}
