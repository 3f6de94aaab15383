//! Feature gates: switches for features that are not final, with etcd's names.
//!
//! `AllAlpha` and `AllBeta` set every gate of their stage that is not set by name.

use super::value::Value;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// The maturity of a feature: beta is enabled by default, alpha is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Alpha,
    Beta,
}

const ALPHA: &str = "ALPHA";
const BETA: &str = "BETA";

struct GateInfo {
    gate: Gate,
    name: &'static str,
    stage: Stage,
    /// The flag that switched this feature before there were gates.
    former_flag: Option<&'static str>,
    /// Why the gate has no effect here, if it has none.
    no_effect: Option<&'static str>,
}

const GATES: &[GateInfo] = &[
    GateInfo {
        gate: Gate::CompactHashCheck,
        name: "CompactHashCheck",
        stage: Stage::Alpha,
        former_flag: Some("experimental-compact-hash-check-enabled"),
        no_effect: None,
    },
    GateInfo {
        gate: Gate::FastLeaseKeepAlive,
        name: "FastLeaseKeepAlive",
        stage: Stage::Beta,
        former_flag: None,
        no_effect: None,
    },
    GateInfo {
        gate: Gate::InitialCorruptCheck,
        name: "InitialCorruptCheck",
        stage: Stage::Alpha,
        former_flag: Some("experimental-initial-corrupt-check"),
        no_effect: None,
    },
    GateInfo {
        gate: Gate::LeaseCheckpoint,
        name: "LeaseCheckpoint",
        stage: Stage::Alpha,
        former_flag: Some("experimental-enable-lease-checkpoint"),
        no_effect: Some("a leader change resets every lease to its full TTL"),
    },
    GateInfo {
        gate: Gate::LeaseCheckpointPersist,
        name: "LeaseCheckpointPersist",
        stage: Stage::Alpha,
        former_flag: Some("experimental-enable-lease-checkpoint-persist"),
        no_effect: Some("a leader change resets every lease to its full TTL"),
    },
    GateInfo {
        gate: Gate::PriorityRequest,
        name: "PriorityRequest",
        stage: Stage::Alpha,
        former_flag: None,
        no_effect: Some("all requests are admitted with the same priority"),
    },
    GateInfo {
        gate: Gate::SetMemberLocalAddr,
        name: "SetMemberLocalAddr",
        stage: Stage::Alpha,
        former_flag: Some("experimental-set-member-localaddr"),
        no_effect: Some("the operating system chooses the local address of connections to members"),
    },
    GateInfo {
        gate: Gate::StopGRPCServiceOnDefrag,
        name: "StopGRPCServiceOnDefrag",
        stage: Stage::Alpha,
        former_flag: Some("experimental-stop-grpc-service-on-defrag"),
        no_effect: Some("requests are served during a defragmentation"),
    },
    GateInfo {
        gate: Gate::TxnModeWriteWithSharedBuffer,
        name: "TxnModeWriteWithSharedBuffer",
        stage: Stage::Beta,
        former_flag: Some("experimental-txn-mode-write-with-shared-buffer"),
        no_effect: Some("transactions never copy a read buffer"),
    },
];

/// The set of enabled gates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureGates {
    enabled: u16,
}

impl Default for FeatureGates {
    fn default() -> Self {
        Self {
            enabled: GATES
                .iter()
                .filter(|info| info.stage == Stage::Beta)
                .fold(0, |enabled, info| enabled | bit(info.gate)),
        }
    }
}

/// The bits of etcd's gates for all features of a stage, which only metrics show.
const ALL_ALPHA: u16 = 1 << 14;
const ALL_BETA: u16 = 1 << 15;

fn bit(gate: Gate) -> u16 {
    1 << gate as u16
}

impl FeatureGates {
    /// Parses `A=true,B=false`.
    ///
    /// # Errors
    /// With etcd's text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut gates = Self::default();
        let (mut stages, mut named) = (Vec::new(), Vec::new());
        for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let (name, value) = item.split_once('=').ok_or_else(|| format!("missing bool value for {item}"))?;
            let (name, value) = (name.trim(), value.trim());
            let enabled = bool::read(value).map_err(|_| {
                format!("invalid value of {name}={value}, err: strconv.ParseBool: parsing {value:?}: invalid syntax")
            })?;
            match name {
                "AllAlpha" => stages.push((Stage::Alpha, enabled)),
                "AllBeta" => stages.push((Stage::Beta, enabled)),
                _ => named.push((find(name).ok_or_else(|| format!("unrecognized feature gate: {name}"))?, enabled)),
            }
        }
        for (stage, enabled) in stages {
            GATES.iter().filter(|info| info.stage == stage).for_each(|info| gates.set(info.gate, enabled));
            let bit = if stage == Stage::Alpha { ALL_ALPHA } else { ALL_BETA };
            gates.enabled = if enabled { gates.enabled | bit } else { gates.enabled & !bit };
        }
        for (gate, enabled) in named {
            gates.set(gate, enabled);
        }
        Ok(gates)
    }

    #[must_use]
    pub fn is_enabled(&self, gate: Gate) -> bool {
        self.enabled & bit(gate) != 0
    }

    /// Enables or disables a gate.
    pub fn set(&mut self, gate: Gate, enabled: bool) {
        if enabled {
            self.enabled |= bit(gate);
        } else {
            self.enabled &= !bit(gate);
        }
    }

    /// The name of every gate, the stage of its feature in etcd's words, and whether it is on. etcd's two gates for all features
    /// of a stage are among them.
    pub fn states(&self) -> impl Iterator<Item = (&'static str, &'static str, bool)> {
        let gates = GATES.iter().map(|info| {
            let stage = if info.stage == Stage::Alpha { ALPHA } else { BETA };
            (info.name, stage, self.is_enabled(info.gate))
        });
        let is_on = |bit| self.enabled & bit != 0;
        [("AllAlpha", ALPHA, is_on(ALL_ALPHA)), ("AllBeta", BETA, is_on(ALL_BETA))].into_iter().chain(gates)
    }

    /// The gates that differ from their default but have no effect here: name and reason.
    pub fn without_effect(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let changed = self.enabled ^ Self::default().enabled;
        let changed = GATES.iter().filter(move |info| changed & bit(info.gate) != 0);
        changed.filter_map(|info| Some((info.name, info.no_effect?)))
    }
}

fn find(name: &str) -> Option<Gate> {
    GATES.iter().find(|info| info.name == name).map(|info| info.gate)
}

/// The gates that were once flags, with the names of those flags.
pub fn former_flags() -> impl Iterator<Item = (&'static str, Gate)> {
    GATES.iter().filter_map(|info| Some((info.former_flag?, info.gate)))
}

/// The name of every gate, and whether it is enabled by default.
pub fn names() -> impl Iterator<Item = (&'static str, bool)> {
    GATES.iter().map(|info| (info.name, info.stage == Stage::Beta))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beta_is_enabled_and_alpha_disabled_by_default() {
        let gates = FeatureGates::parse("").unwrap();
        assert!(gates.is_enabled(Gate::FastLeaseKeepAlive));
        assert!(!gates.is_enabled(Gate::InitialCorruptCheck));
        assert_eq!(gates.without_effect().count(), 0);
    }

    #[test]
    fn a_gate_set_by_name_overrides_its_stage() {
        let gates = FeatureGates::parse(" PriorityRequest = false ,AllAlpha=true, AllBeta=f").unwrap();
        assert!(gates.is_enabled(Gate::LeaseCheckpoint));
        assert!(!gates.is_enabled(Gate::PriorityRequest));
        assert!(!gates.is_enabled(Gate::FastLeaseKeepAlive));
    }

    #[test]
    fn the_state_of_every_gate_is_known_for_metrics() {
        let gates = FeatureGates::parse("AllAlpha=true,LeaseCheckpoint=false").unwrap();
        let states: Vec<_> = gates.states().collect();
        assert_eq!(states.len(), GATES.len() + 2);
        for expected in [
            ("AllAlpha", "ALPHA", true),
            ("AllBeta", "BETA", false),
            ("LeaseCheckpoint", "ALPHA", false),
            ("PriorityRequest", "ALPHA", true),
            ("FastLeaseKeepAlive", "BETA", true),
        ] {
            assert!(states.contains(&expected), "{expected:?} in {states:?}");
        }
    }

    #[test]
    fn errors_have_etcds_texts() {
        for (text, error) in [
            ("Foo=true", "unrecognized feature gate: Foo"),
            ("AllAlpha", "missing bool value for AllAlpha"),
            ("AllAlpha=x", "invalid value of AllAlpha=x, err: strconv.ParseBool: parsing \"x\": invalid syntax"),
        ] {
            assert_eq!(FeatureGates::parse(text).unwrap_err(), error);
        }
    }

    #[test]
    fn a_gate_without_effect_is_reported() {
        let gates = FeatureGates::parse("InitialCorruptCheck=true,PriorityRequest=true").unwrap();
        assert_eq!(gates.without_effect().map(|(name, _)| name).collect::<Vec<_>>(), ["PriorityRequest"]);
    }
}
