//! The lease workload: one stream per client, on which it keeps its leases alive in turn.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use crate::proto::etcdserverpb::{
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseRevokeRequest, lease_client::LeaseClient,
};

use super::measure::Failure;

/// Keeps a set of leases alive, one call at a time.
pub(super) struct KeepAlive {
    client: LeaseClient<Channel>,
    leases: Vec<i64>,
    next: usize,
    stream: Option<Stream>,
}

struct Stream {
    requests: mpsc::Sender<LeaseKeepAliveRequest>,
    responses: Streaming<LeaseKeepAliveResponse>,
}

impl KeepAlive {
    /// Grants `count` leases, at least one.
    pub(super) async fn grant(channel: Channel, count: u32, ttl: i64) -> Result<Self, Failure> {
        assert!(count > 0, "at least one lease per client");
        let mut client = LeaseClient::new(channel);
        let mut leases = Vec::with_capacity(count as usize);
        for _ in 0..count {
            leases.push(client.lease_grant(LeaseGrantRequest { ttl, id: 0 }).await?.into_inner().id);
        }
        Ok(Self { client, leases, next: 0, stream: None })
    }

    /// Keeps the next lease alive.
    pub(super) async fn call(&mut self) -> Result<(), Failure> {
        let id = self.leases[self.next];
        self.next = (self.next + 1) % self.leases.len();
        let answer = self.exchange(id).await;
        if answer.is_err() {
            self.stream = None; // The next call opens a new one.
        }
        let answer = answer?;
        if answer.id != id {
            return Err(Failure::wrong_answer(format!("asked about lease {id:x}, got {:x}", answer.id)));
        }
        if answer.ttl <= 0 {
            return Err(Failure::wrong_answer(format!("lease {id:x} has expired")));
        }
        Ok(())
    }

    pub(super) async fn revoke(mut self) -> Result<(), Failure> {
        for id in self.leases {
            self.client.lease_revoke(LeaseRevokeRequest { id }).await?;
        }
        Ok(())
    }

    async fn exchange(&mut self, id: i64) -> Result<LeaseKeepAliveResponse, Failure> {
        let ended = || Failure::unanswered("the server ended the keep-alive stream");
        let stream = match &mut self.stream {
            Some(stream) => {
                stream.requests.send(LeaseKeepAliveRequest { id }).await.map_err(|_| ended())?;
                stream
            }
            None => self.stream.insert(open(&mut self.client, id).await?),
        };
        stream.responses.message().await?.ok_or_else(ended)
    }
}

/// Opens a stream together with its first request: a server may wait for that before it accepts the stream.
async fn open(client: &mut LeaseClient<Channel>, id: i64) -> Result<Stream, Failure> {
    let (requests, receiver) = mpsc::channel(1);
    requests.try_send(LeaseKeepAliveRequest { id }).expect("an empty channel has capacity for one");
    let responses = client.lease_keep_alive(ReceiverStream::new(receiver)).await?.into_inner();
    Ok(Stream { requests, responses })
}
