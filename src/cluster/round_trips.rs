//! How long a request to another member and its response take: measured on the pooled connections of [`PeerClient`], smoothed, and
//! exported as etcd does.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{task::JoinSet, time::sleep};

use super::{Cluster, peer_client::PeerClient};
use crate::{metrics::METRICS, proto::etcdserverpb::Member};

/// How often each member is asked, which is also how long it may take to answer.
const INTERVAL: Duration = Duration::from_secs(4);
/// How often the smoothed time is observed, after the first time.
const OBSERVATION_INTERVAL: Duration = Duration::from_secs(30);
/// How much a new time counts: one part in so many.
const SMOOTHING: u32 = 8;

/// What is known of the way to one member.
#[derive(Debug, Default)]
struct RoundTrips {
    smoothed: Option<Duration>,
    /// There is a connection: the last request was answered. The first one of a connection includes the time to connect.
    is_connected: bool,
    observed_at: Option<Instant>,
}

impl RoundTrips {
    /// Adds the time of a round trip, None if there was no answer. Returns the smoothed time if it is to be observed now.
    fn add(&mut self, took: Option<Duration>, now: Instant) -> Option<Duration> {
        let was_connected = std::mem::replace(&mut self.is_connected, took.is_some());
        let took = took.filter(|_| was_connected)?;
        let smoothed = self.smoothed.map_or(took, |before| (before * (SMOOTHING - 1) + took) / SMOOTHING);
        self.smoothed = Some(smoothed);
        let is_due = self.observed_at.is_none_or(|at| now.saturating_duration_since(at) >= OBSERVATION_INTERVAL);
        is_due.then(|| {
            self.observed_at = Some(now);
            smoothed
        })
    }
}

/// Measures the round trips to all other members, for as long as this member runs.
pub async fn measure(cluster: Arc<Cluster>) {
    let mut known: BTreeMap<u64, RoundTrips> = BTreeMap::new();
    loop {
        sleep(INTERVAL).await;
        let others = cluster.members().into_iter().filter(|member| member.id != cluster.member_id);
        let mut requests = JoinSet::new();
        for member in others {
            let client = cluster.client.clone();
            requests.spawn(async move { (member.id, request(&client, &member).await) });
        }
        let times: BTreeMap<u64, Option<Duration>> = requests.join_all().await.into_iter().collect();
        known.retain(|member, _| times.contains_key(member));
        for (member, took) in times {
            if let Some(smoothed) = known.entry(member).or_default().add(took, Instant::now()) {
                METRICS.round_trips.with_label_values(&[format!("{member:x}")]).observe(smoothed.as_secs_f64());
            }
        }
    }
}

/// How long a small request takes; None if no URL of the member answers.
async fn request(client: &PeerClient, member: &Member) -> Option<Duration> {
    for url in &member.peer_ur_ls {
        let started = Instant::now();
        if client.versions(url, INTERVAL).await.is_ok() {
            return Some(started.elapsed());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_are_smoothed_and_observed_every_half_minute() {
        let (mut trips, start) = (RoundTrips::default(), Instant::now());
        let (ms, at) = (Duration::from_millis, |seconds| start + Duration::from_secs(seconds));
        assert_eq!(trips.add(Some(ms(900)), at(0)), None, "the first one has to connect");
        assert_eq!(trips.add(Some(ms(80)), at(4)), Some(ms(80)));
        assert_eq!(trips.add(Some(ms(160)), at(8)), None);
        assert_eq!(trips.smoothed, Some(ms(90)));
        assert_eq!(trips.add(None, at(40)), None, "no answer is no time");
        assert_eq!(trips.add(Some(ms(900)), at(44)), None, "it has to connect again");
        assert_eq!(trips.add(Some(ms(90)), at(48)), Some(ms(90)));
    }
}
