//! Connections.

use tonic::transport::{Channel, Endpoint};

/// Long lists must not wait for window updates.
const STREAM_WINDOW: u32 = 16 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;

/// One new connection to the server at `address`, on the runtime of the caller, for up to `callers` calls at once.
pub(super) async fn connect(address: &str, callers: u32) -> Result<Channel, String> {
    let endpoint =
        Endpoint::from_shared(address.to_owned()).map_err(|error| format!("{address}: {}", chain(&error)))?;
    endpoint
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .buffer_size(callers.max(16) as usize)
        .connect()
        .await
        .map_err(|error| format!("{address}: {}", chain(&error)))
}

/// An error with all of its causes: tonic's own words are just "transport error".
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !words.contains(&more) {
            words.push_str(": ");
            words.push_str(&more);
        }
        cause = error.source();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_that_is_not_there_is_named_with_the_reason() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let refusal = connect(&address, 1).await.unwrap_err();
        assert!(refusal.contains(&address) && refusal.contains("refused"), "{refusal}");
    }
}
