//! Protocol errors of clients, and how they are reported to them.

use std::fmt;

/// The error codes of RFC 9113 §7.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "named by RFC 9113")]
pub enum Code {
    NoError = 0x0,
    Protocol = 0x1,
    Internal = 0x2,
    FlowControl = 0x3,
    SettingsTimeout = 0x4,
    StreamClosed = 0x5,
    FrameSize = 0x6,
    RefusedStream = 0x7,
    Cancel = 0x8,
    Compression = 0x9,
    EnhanceYourCalm = 0xb,
}

impl Code {
    /// The label of the metric.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NoError => "no_error",
            Self::Protocol => "protocol_error",
            Self::Internal => "internal_error",
            Self::FlowControl => "flow_control_error",
            Self::SettingsTimeout => "settings_timeout",
            Self::StreamClosed => "stream_closed",
            Self::FrameSize => "frame_size_error",
            Self::RefusedStream => "refused_stream",
            Self::Cancel => "cancel",
            Self::Compression => "compression_error",
            Self::EnhanceYourCalm => "enhance_your_calm",
        }
    }
}

/// An error that ends a stream or the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The stream that ends; zero for the connection.
    pub stream: u32,
    /// The code that the client receives.
    pub code: Code,
    /// The reason, for the log and for GOAWAY.
    pub why: &'static str,
}

impl Fault {
    /// An error that ends the connection.
    #[must_use]
    pub const fn connection(code: Code, why: &'static str) -> Self {
        Self { stream: 0, code, why }
    }

    /// An error that ends a stream.
    #[must_use]
    pub const fn stream(stream: u32, code: Code, why: &'static str) -> Self {
        Self { stream, code, why }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.name(), self.why)
    }
}
