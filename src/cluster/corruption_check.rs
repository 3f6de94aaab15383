//! The corruption check: compares hashes of the data of all members. If the data of a member differs, the CORRUPT alarm is
//! raised, which refuses all writes before more damage is done.
//!
//! | when | what is compared | if it differs |
//! | --- | --- | --- |
//! | before serving, with `InitialCorruptCheck` | the newest revision of this member | this member does not start |
//! | every `--corrupt-check-time`, by the leader | its newest revision | alarm for the member that differs |
//! | every `--compact-hash-check-time`, with `CompactHashCheck`, by the leader | recent compactions | alarm for the minority |
//!
//! Two hashes are comparable only if they were computed at the same revision and after the same compaction. A member that does
//! not answer, or belongs to another cluster, is left out.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use prost::Message;
use tokio::time::sleep;

use super::{Cluster, await_outcome, peer_client::PeerHash};
use crate::{
    config::{Config, gates::Gate},
    error::Error,
    mvcc::compact::KeyHash,
    proto::etcdserverpb::{AlarmRequest, AlarmType, alarm_request::AlarmAction},
    state::Kind,
};

/// A member ID, and the member's hash if it has answered.
type MemberHash = (u64, Option<PeerHash>);

/// Compares the data of this member with that of the others; `Err` if it must not start.
pub async fn check_before_serving(cluster: &Arc<Cluster>) -> Result<(), String> {
    let this = format!("{:x}", cluster.member_id);
    tracing::info!({ "local-member-id" = this }, "starting initial corruption check");
    let own = cluster.hash_at(0).await.map_err(|error| format!("{this} failed to fetch hash ({error})"))?;
    let differs = |hash: &PeerHash| hash.compact_revision == own.compact_revision && hash.hash != own.hash;
    if fetch_hashes(cluster, own.hash_revision)
        .await
        .into_iter()
        .filter_map(|(_, hash)| hash)
        .any(|hash| differs(&hash))
    {
        return Err(format!("{this} found data inconsistency with peers"));
    }
    tracing::info!({ "local-member-id" = this }, "initial corruption checking passed; no corruption");
    Ok(())
}

/// Starts the periodic checks.
pub fn start(config: &Config, cluster: &Arc<Cluster>) {
    if let Some(interval) = config.corrupt_check_interval {
        tracing::info!({ interval = ?interval }, "enabled corruption checking");
        tokio::spawn(compare_data_every(interval, cluster.clone()));
    }
    if config.feature_gates.is_enabled(Gate::CompactHashCheck) {
        tokio::spawn(compare_compactions_every(config.compact_hash_check_interval, cluster.clone()));
    }
}

async fn compare_data_every(interval: Duration, cluster: Arc<Cluster>) {
    loop {
        sleep(interval).await;
        if cluster.leads()
            && let Err(error) = compare_data(&cluster).await
        {
            tracing::warn!(%error, "failed to check hash KV");
        }
    }
}

async fn compare_data(cluster: &Arc<Cluster>) -> Result<(), Error> {
    let first = cluster.hash_at(0).await?;
    let others = fetch_hashes(cluster, first.hash_revision).await;
    await_outcome(|waiter| cluster.node.read_barrier(waiter)).await?;
    let second = cluster.hash_at(0).await?;
    if let Some(member) = find_corrupt_member(cluster.member_id, first, &others, second) {
        raise_alarm(cluster, member).await;
    }
    let compared = others.iter().filter(|(_, hash)| hash.is_some()).count();
    tracing::info!({ "number-of-peers-checked" = compared }, "finished peer corruption check");
    Ok(())
}

/// A member whose data must be corrupt. `first` is the leader's hash at the revision that the other members were asked for;
/// `second` was computed after all of their hashes, so no member can be ahead of it.
fn find_corrupt_member(leader: u64, first: PeerHash, others: &[MemberHash], second: PeerHash) -> Option<u64> {
    let same_state = (first.hash_revision, first.compact_revision) == (second.hash_revision, second.compact_revision);
    if same_state && first.hash != second.hash {
        return Some(leader);
    }
    let is_corrupt = |hash: &PeerHash| {
        hash.head > second.head
            || hash.compact_revision > second.compact_revision
            || (hash.compact_revision == first.compact_revision && hash.hash != first.hash)
    };
    others.iter().find(|(_, hash)| hash.as_ref().is_some_and(is_corrupt)).map(|(member, _)| *member)
}

async fn compare_compactions_every(interval: Duration, cluster: Arc<Cluster>) {
    let mut compared = i64::MIN;
    loop {
        sleep(interval).await;
        if cluster.leads() {
            compare_compactions(&cluster, &mut compared).await;
        }
    }
}

/// Goes back from the newest compaction to one whose hash all members still hold. `compared` is the newest compaction for which
/// all hashes have been equal.
async fn compare_compactions(cluster: &Arc<Cluster>, compared: &mut i64) {
    let hashes = cluster.node.readers().keys.compaction_hashes();
    for own in hashes.into_iter().take_while(|hash| hash.hash_revision > *compared) {
        let others = fetch_hashes(cluster, own.hash_revision).await;
        if others.is_empty() {
            return;
        }
        match compare_with_others(cluster.member_id, &own, &others) {
            HashComparison::Equal => {
                tracing::info!({ revision = own.hash_revision }, "successfully checked hash on whole cluster");
                *compared = own.hash_revision;
                return;
            }
            HashComparison::Incomplete => (),
            HashComparison::Different(members) => {
                let all: Vec<String> = members.iter().map(|member| format!("{member:x}")).collect();
                let (revision, members_text) = (own.hash_revision, all.join(", "));
                tracing::error!({ revision, "peer-ids" = members_text }, "Detected compaction hash mismatch");
                for member in members {
                    raise_alarm(cluster, member).await;
                }
                return;
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum HashComparison {
    /// The hashes of all members are equal.
    Equal,
    /// Those that are comparable are equal.
    Incomplete,
    /// The members that differ from the majority; a single zero if there is no majority.
    Different(Vec<u64>),
}

fn compare_with_others(leader: u64, own: &KeyHash, others: &[MemberHash]) -> HashComparison {
    let mut groups = BTreeMap::from([(own.hash, vec![leader])]);
    let mut comparable = 0;
    for (member, hash) in others {
        let Some(hash) = hash.filter(|hash| hash.compact_revision == own.compact_revision) else { continue };
        comparable += 1;
        groups.entry(hash.hash).or_default().push(*member);
    }
    if groups.len() == 1 {
        return if comparable == others.len() { HashComparison::Equal } else { HashComparison::Incomplete };
    }
    let majority = others.len().div_ceil(2) + 1;
    let Some(majority_hash) = groups.iter().find(|(_, members)| members.len() >= majority).map(|(hash, _)| *hash)
    else {
        return HashComparison::Different(vec![0]);
    };
    groups.remove(&majority_hash);
    let mut minority: Vec<u64> = groups.into_values().flatten().collect();
    minority.sort_unstable();
    HashComparison::Different(minority)
}

/// Fetches the hashes of all other members at a revision, in the order of their IDs.
async fn fetch_hashes(cluster: &Arc<Cluster>, revision: i64) -> Vec<MemberHash> {
    let mut hashes = Vec::new();
    for member in cluster.members().into_iter().filter(|member| member.id != cluster.member_id) {
        let mut hash = None;
        for url in &member.peer_ur_ls {
            let answer = cluster.client.hash_kv(url, cluster.cluster_id, revision, cluster.request_timeout).await;
            match answer.and_then(|answer| answer.map_err(|error| error.to_string())) {
                Ok(found) => {
                    hash = Some(found);
                    break;
                }
                Err(error) => tracing::warn!({ "remote-peer-endpoint" = url, error }, "failed hash kv request"),
            }
        }
        hashes.push((member.id, hash));
    }
    hashes
}

async fn raise_alarm(cluster: &Arc<Cluster>, member_id: u64) {
    tracing::error!(
        { "member-id" = format_args!("{member_id:x}") },
        "data of members differs; raising the CORRUPT alarm"
    );
    let action = AlarmAction::Activate as i32;
    let request = AlarmRequest { action, member_id, alarm: AlarmType::Corrupt as i32 };
    if let Err(error) = cluster.propose(Kind::Alarm, request.encode_to_vec()).await {
        tracing::warn!(%error, "failed to raise the CORRUPT alarm");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(hash: u32, head: i64, compact_revision: i64) -> PeerHash {
        PeerHash { hash, hash_revision: 10, compact_revision, head }
    }

    #[test]
    fn the_leader_finds_a_member_whose_data_must_be_corrupt() {
        let (first, second) = (hash(7, 10, 5), PeerHash { hash_revision: 12, ..hash(9, 12, 6) });
        for (other, is_corrupt) in [
            (hash(7, 10, 5), false),
            (hash(7, 12, 5), false),
            (hash(7, 13, 5), true),
            (hash(8, 10, 5), true),
            (hash(8, 10, 4), false),
            (hash(8, 12, 6), false),
            (hash(7, 12, 7), true),
        ] {
            let others = [(2, None), (3, Some(other))];
            assert_eq!(find_corrupt_member(1, first, &others, second), is_corrupt.then_some(3), "{other:?}");
        }
        let changed = hash(8, 10, 5);
        assert_eq!(
            find_corrupt_member(1, first, &[(2, Some(hash(8, 10, 5)))], changed),
            Some(1),
            "one alarm at a time"
        );
        assert_eq!(find_corrupt_member(1, first, &[], first), None);
    }

    #[test]
    fn the_majority_of_compaction_hashes_decides() {
        let own = KeyHash { hash: 7, hash_revision: 10, compact_revision: 5, head: 20 };
        let same = |member| (member, Some(hash(7, 20, 5)));
        let other = |member, hash_of| (member, Some(hash(hash_of, 20, 5)));
        for (others, expected) in [
            (vec![same(2), same(3)], HashComparison::Equal),
            (vec![same(2), (3, None)], HashComparison::Incomplete),
            (vec![same(2), (3, Some(hash(8, 20, 4)))], HashComparison::Incomplete),
            (vec![same(2), other(3, 8)], HashComparison::Different(vec![3])),
            (vec![other(2, 8), other(3, 8)], HashComparison::Different(vec![1])),
            (vec![other(2, 8), other(3, 9)], HashComparison::Different(vec![0])),
            (vec![other(2, 8), (3, None)], HashComparison::Different(vec![0])),
            (vec![other(2, 8)], HashComparison::Different(vec![0])),
            (vec![same(2), same(3), other(4, 8), other(5, 9)], HashComparison::Different(vec![4, 5])),
            (vec![same(2), other(3, 8), other(4, 8)], HashComparison::Different(vec![0])),
        ] {
            assert_eq!(compare_with_others(1, &own, &others), expected, "{others:?}");
        }
    }
}
