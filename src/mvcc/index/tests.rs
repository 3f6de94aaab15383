use std::collections::BTreeMap;

use rand::{RngExt, SeedableRng, rngs::SmallRng};

use super::*;

type Model = BTreeMap<Vec<u8>, Vec<(i64, bool)>>;

fn live(create: i64) -> KeyMetadata {
    KeyMetadata { create, version: 1, lease: create % 3 }
}

/// The record length that the tests report for a change; for some it exceeds the maximum.
fn bytes_of(main: i64) -> u32 {
    if main % 7 == 0 { MAX_RECORD_BYTES } else { u32::try_from(main).unwrap() }
}

fn live_in(model: &Model, interval: &Interval, at: i64) -> Vec<(Vec<u8>, i64)> {
    let inside = model.iter().filter(|(key, _)| interval.contains(key));
    let visible = inside.filter_map(|(key, changes)| {
        let (main, deleted) = changes.iter().rfind(|(main, _)| *main <= at)?;
        (!deleted).then(|| (key.clone(), *main))
    });
    visible.collect()
}

fn check(index: &Index, model: &Model, interval: &Interval, at: i64) {
    let expected = live_in(model, interval, at);
    let mut seen = Vec::new();
    let mut note = |key: &[u8], hit: Hit| {
        seen.push((key.to_vec(), hit.revision.main));
        ControlFlow::Continue(())
    };
    index.visit(interval, at, &mut note);
    let mut rest = Some(interval.clone());
    while let Some(part) = rest {
        rest = index.visit_bounded(&part, at, 7, &mut note).map(|key| part.starting_at(key));
    }
    assert_eq!(seen[..seen.len() / 2], expected);
    assert_eq!(seen[seen.len() / 2..], expected, "in bounded steps");
    assert_eq!(index.count(interval, at), expected.len(), "count in {interval:?} at {at}");
    let (mut counted, mut rest) = (0, Some(interval.clone()));
    while let Some(part) = rest {
        let (count, next) = index.count_bounded(&part, at, 100);
        counted += count;
        rest = next.map(|key| part.starting_at(key));
    }
    assert_eq!(counted, expected.len(), "count in {interval:?} at {at} in bounded steps");
    for (key, main) in expected {
        assert_eq!(index.get(&key, at).map(|hit| hit.revision.main), Some(main));
    }
}

#[test]
fn random_histories_match_a_map_of_lists() {
    for seed in 0..20 {
        let mut random = SmallRng::seed_from_u64(seed);
        let (mut index, mut model) = (Index::default(), Model::new());
        let mut compacted = 0;
        for main in 1..3000_i64 {
            let key = format!("{:04}", random.random_range(0..800)).into_bytes();
            let deleted = random.random_bool(0.3);
            let metadata = (!deleted).then(|| live(main));
            index.push(&key, Change { revision: Revision { main, sub: 0 }, metadata, bytes: bytes_of(main) });
            model.entry(key).or_default().push((main, deleted));
            if main % 500 == 0 {
                compacted = random.random_range(compacted..=main);
                compact_both(&mut index, &mut model, compacted);
                assert_eq!(index.len(), model.len());
            }
            if main % 100 == 0 {
                let (a, b) = (random.random_range(0..800), random.random_range(0..800));
                let interval = Interval::new(format!("{a:04}").into(), format!("{b:04}").into());
                check(&index, &model, &interval, random.random_range(compacted..=main));
                check(&index, &model, &Interval::new("\0".into(), "\0".into()), main);
            }
        }
    }
}

fn compact_both(index: &mut Index, model: &mut Model, at: i64) {
    let mut removed = Vec::new();
    let mut expected = Vec::new();
    for (key, changes) in &mut *model {
        let last = changes.iter().rposition(|(main, _)| *main <= at);
        let keep_from = last.map_or(0, |last| last + usize::from(changes[last].1 && changes[last].0 < at));
        let kept = last.filter(|&last| last >= keep_from).map(|last| Revision { main: changes[last].0, sub: 0 });
        assert_eq!(index.plan_compaction(key, at), KeyCompaction { dropped: keep_from, kept });
        index.compact(key, at, &mut removed);
        assert_eq!(index.plan_compaction(key, at), KeyCompaction { dropped: 0, kept });
        expected.extend(changes.drain(..keep_from).map(|(main, deletion)| RemovedChange {
            revision: Revision { main, sub: 0 },
            deletion,
            bytes: bytes_of(main),
        }));
    }
    model.retain(|_, changes| !changes.is_empty());
    assert_eq!(removed, expected);
}

#[test]
fn a_new_key_is_found_at_whatever_position_it_splits_a_leaf() {
    for position in 0..=LEAF_MAX {
        // Every fourth number fills a leaf; one in between splits it; then one key just below and one just above it follow.
        let full = (0..LEAF_MAX).map(|nth| 4 * nth + 4);
        let keys = full.chain([4 * position + 2, 4 * position + 1, 4 * position + 3]);
        let (mut index, mut model) = (Index::default(), Model::new());
        for (main, key) in (1..).zip(keys) {
            let key = format!("{key:04}").into_bytes();
            index.push(&key, Change { revision: Revision { main, sub: 0 }, metadata: Some(live(main)), bytes: 0 });
            model.entry(key).or_default().push((main, false));
        }
        check(&index, &model, &Interval::new("\0".into(), "\0".into()), i64::MAX);
    }
}

#[test]
fn keys_in_order_fill_their_leaves() {
    let mut index = Index::default();
    for nth in 0..10_000_i64 {
        let key = format!("{nth:06}");
        let revision = Revision { main: nth + 1, sub: 0 };
        index.push(key.as_bytes(), Change { revision, metadata: Some(live(nth + 1)), bytes: 0 });
    }
    assert_eq!(index.leaves.len(), 10_000_usize.div_ceil(LEAF_MAX));
    assert_eq!(size_of::<Entry>(), 56, "the memory budget of an entry");
}
