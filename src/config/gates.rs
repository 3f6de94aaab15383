//! Feature gates: switches for behaviour that is not settled, by the names etcd gave them.
//!
//! `AllAlpha` and `AllBeta` set every gate of their stage that is not named itself.

use super::value::Value;

/// A switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "etcd names them")]
pub enum Gate {
    CompactHashCheck,
    FastLeaseKeepAlive,
    InitialCorruptCheck,
    LeaseCheckpoint,
    LeaseCheckpointPersist,
    PriorityRequest,
    SetMemberLocalAddr,
    StopGRPCServiceOnDefrag,
    TxnModeWriteWithSharedBuffer,
}

/// How settled a gate's behaviour is: beta is on unless it is switched off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Alpha,
    Beta,
}

/// A gate as people type it, its flag of old, and what switching it does not do here, if it does nothing.
struct Row {
    gate: Gate,
    name: &'static str,
    stage: Stage,
    once: Option<&'static str>,
    lacks: Option<&'static str>,
}

const ROWS: &[Row] = &[
    Row {
        gate: Gate::CompactHashCheck,
        name: "CompactHashCheck",
        stage: Stage::Alpha,
        once: Some("experimental-compact-hash-check-enabled"),
        lacks: None,
    },
    Row { gate: Gate::FastLeaseKeepAlive, name: "FastLeaseKeepAlive", stage: Stage::Beta, once: None, lacks: None },
    Row {
        gate: Gate::InitialCorruptCheck,
        name: "InitialCorruptCheck",
        stage: Stage::Alpha,
        once: Some("experimental-initial-corrupt-check"),
        lacks: None,
    },
    Row {
        gate: Gate::LeaseCheckpoint,
        name: "LeaseCheckpoint",
        stage: Stage::Alpha,
        once: Some("experimental-enable-lease-checkpoint"),
        lacks: Some("a new leader gives every lease its whole time again"),
    },
    Row {
        gate: Gate::LeaseCheckpointPersist,
        name: "LeaseCheckpointPersist",
        stage: Stage::Alpha,
        once: Some("experimental-enable-lease-checkpoint-persist"),
        lacks: Some("a new leader gives every lease its whole time again"),
    },
    Row {
        gate: Gate::PriorityRequest,
        name: "PriorityRequest",
        stage: Stage::Alpha,
        once: None,
        lacks: Some("all requests are admitted alike"),
    },
    Row {
        gate: Gate::SetMemberLocalAddr,
        name: "SetMemberLocalAddr",
        stage: Stage::Alpha,
        once: Some("experimental-set-member-localaddr"),
        lacks: Some("the system chooses the address that members are called from"),
    },
    Row {
        gate: Gate::StopGRPCServiceOnDefrag,
        name: "StopGRPCServiceOnDefrag",
        stage: Stage::Alpha,
        once: Some("experimental-stop-grpc-service-on-defrag"),
        lacks: Some("a defragmentation stops nobody"),
    },
    Row {
        gate: Gate::TxnModeWriteWithSharedBuffer,
        name: "TxnModeWriteWithSharedBuffer",
        stage: Stage::Beta,
        once: Some("experimental-txn-mode-write-with-shared-buffer"),
        lacks: Some("transactions never copy a read buffer"),
    },
];

/// Which gates are open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureGates {
    open: u16,
}

impl Default for FeatureGates {
    fn default() -> Self {
        Self { open: ROWS.iter().filter(|row| row.stage == Stage::Beta).fold(0, |open, row| open | bit(row.gate)) }
    }
}

fn bit(gate: Gate) -> u16 {
    1 << gate as u16
}

impl FeatureGates {
    /// Reads `A=true,B=false`.
    ///
    /// # Errors
    /// In etcd's words.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut gates = Self::default();
        let (mut stages, mut named) = (Vec::new(), Vec::new());
        for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let (name, value) = item.split_once('=').ok_or_else(|| format!("missing bool value for {item}"))?;
            let (name, value) = (name.trim(), value.trim());
            let open = bool::read(value).map_err(|_| {
                format!("invalid value of {name}={value}, err: strconv.ParseBool: parsing {value:?}: invalid syntax")
            })?;
            match name {
                "AllAlpha" => stages.push((Stage::Alpha, open)),
                "AllBeta" => stages.push((Stage::Beta, open)),
                _ => named.push((find(name).ok_or_else(|| format!("unrecognized feature gate: {name}"))?, open)),
            }
        }
        for (stage, open) in stages {
            ROWS.iter().filter(|row| row.stage == stage).for_each(|row| gates.set(row.gate, open));
        }
        for (gate, open) in named {
            gates.set(gate, open);
        }
        Ok(gates)
    }

    /// Whether a gate is open.
    #[must_use]
    pub fn is_open(&self, gate: Gate) -> bool {
        self.open & bit(gate) != 0
    }

    /// Opens or closes a gate.
    pub fn set(&mut self, gate: Gate, open: bool) {
        if open {
            self.open |= bit(gate);
        } else {
            self.open &= !bit(gate);
        }
    }

    /// The gates that are not as they would be unasked: name, and what that does not do yet.
    pub fn without_effect(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let changed = self.open ^ Self::default().open;
        let changed = ROWS.iter().filter(move |row| changed & bit(row.gate) != 0);
        changed.filter_map(|row| Some((row.name, row.lacks?)))
    }
}

fn find(name: &str) -> Option<Gate> {
    ROWS.iter().find(|row| row.name == name).map(|row| row.gate)
}

/// The gates that were flags once, with those flags' names.
pub fn once_flags() -> impl Iterator<Item = (&'static str, Gate)> {
    ROWS.iter().filter_map(|row| Some((row.once?, row.gate)))
}

/// Every gate by name, with whether it is open unasked.
pub fn names() -> impl Iterator<Item = (&'static str, bool)> {
    ROWS.iter().map(|row| (row.name, row.stage == Stage::Beta))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beta_is_open_and_alpha_closed_until_told() {
        let gates = FeatureGates::parse("").unwrap();
        assert!(gates.is_open(Gate::FastLeaseKeepAlive));
        assert!(!gates.is_open(Gate::InitialCorruptCheck));
        assert_eq!(gates.without_effect().count(), 0);
    }

    #[test]
    fn a_named_gate_beats_its_stage() {
        let gates = FeatureGates::parse(" PriorityRequest = false ,AllAlpha=true, AllBeta=f").unwrap();
        assert!(gates.is_open(Gate::LeaseCheckpoint));
        assert!(!gates.is_open(Gate::PriorityRequest));
        assert!(!gates.is_open(Gate::FastLeaseKeepAlive));
    }

    #[test]
    fn errors_are_etcds() {
        for (text, error) in [
            ("Foo=true", "unrecognized feature gate: Foo"),
            ("AllAlpha", "missing bool value for AllAlpha"),
            ("AllAlpha=x", "invalid value of AllAlpha=x, err: strconv.ParseBool: parsing \"x\": invalid syntax"),
        ] {
            assert_eq!(FeatureGates::parse(text).unwrap_err(), error);
        }
    }

    #[test]
    fn a_gate_without_effect_is_told() {
        let gates = FeatureGates::parse("InitialCorruptCheck=true,PriorityRequest=true").unwrap();
        assert_eq!(gates.without_effect().map(|(name, _)| name).collect::<Vec<_>>(), ["PriorityRequest"]);
    }
}
