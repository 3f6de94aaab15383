//! Which changes of the members could cost the quorum: the rules of `--strict-reconfig-check`.
//!
//! Two questions are asked before anything is proposed. Would enough *started* voters be left (one has started if it has ever
//! told its name)? And is this member *connected* to so many voters, for so long, that the others can be taken to be alive?

use std::time::Duration;

use crate::{error::Error, state::Members};

/// A connection must have stood for longer than this to count.
const HEALTHY_AFTER: Duration = Duration::from_secs(5);

/// The members, as one of them sees them.
pub struct Outlook<'a, Connected> {
    /// All of them.
    pub members: &'a Members,
    /// Who looks.
    pub this: u64,
    /// For how long a member has been connected to this one; None if it is not.
    pub connected: Connected,
}

impl<Connected: Fn(u64) -> Option<Duration>> Outlook<'_, Connected> {
    /// Whether somebody may be added.
    pub fn check_addition(&self, is_learner: bool) -> Result<(), Error> {
        let (voters, started) = self.count(None);
        // The second member of a cluster is always admitted: a cluster that was restored from a backup grows so.
        let is_second = voters == 1 && started == 1;
        if !is_learner && !is_second && started < majority(voters + 1) {
            return Err(Error::MemberNotEnoughStarted);
        }
        if voters > 1 && self.healthy() < majority(voters + 1) {
            return Err(Error::Unhealthy);
        }
        Ok(())
    }

    /// Whether a member may be removed. One that does not exist counts as one that is down.
    pub fn check_removal(&self, id: u64) -> Result<(), Error> {
        if self.members.get(id).is_some_and(|member| member.is_learner) {
            return Ok(());
        }
        let (left, started) = self.count(Some(id));
        if started < majority(left) {
            return Err(Error::MemberNotEnoughStarted);
        }
        if id != self.this && (self.connected)(id).is_none() {
            return Ok(()); // Who is down takes nothing away.
        }
        let (voters, _) = self.count(None);
        if self.healthy() < 1 + majority(voters.saturating_sub(1)) {
            return Err(Error::Unhealthy);
        }
        Ok(())
    }

    /// Whether a learner may be promoted. It counts as started.
    pub fn check_promotion(&self) -> Result<(), Error> {
        let (voters, started) = self.count(None);
        if started + 1 < majority(voters + 1) { Err(Error::MemberNotEnoughStarted) } else { Ok(()) }
    }

    /// How many voters there are, without one of them, and how many of those have started.
    fn count(&self, without: Option<u64>) -> (usize, usize) {
        let voters = || self.members.voters().filter(|member| Some(member.id) != without);
        (voters().count(), voters().filter(|member| !member.name.is_empty()).count())
    }

    /// How many voters are connected, this one included.
    fn healthy(&self) -> usize {
        let is_healthy = |id| id == self.this || (self.connected)(id).is_some_and(|age| age > HEALTHY_AFTER);
        self.members.voters().filter(|member| is_healthy(member.id)).count()
    }
}

fn majority(voters: usize) -> usize {
    voters / 2 + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::etcdserverpb::Member;

    /// Members by letters: `s`tarted and `u`nstarted voters, `l`earners, numbered from 1. Member 1 looks, and is connected
    /// to those that are named.
    fn check<T>(
        members: &str,
        connected: &[(u64, u64)],
        ask: impl FnOnce(Outlook<'_, &dyn Fn(u64) -> Option<Duration>>) -> T,
    ) -> T {
        let members = Members::new(members.chars().zip(1..).map(|(kind, id)| Member {
            id,
            name: if kind == 'u' { String::new() } else { id.to_string() },
            is_learner: kind == 'l',
            ..Member::default()
        }));
        let links = |id| connected.iter().find(|(member, _)| *member == id).map(|(_, age)| Duration::from_secs(*age));
        ask(Outlook { members: &members, this: 1, connected: &links })
    }

    #[test]
    fn an_addition_needs_started_and_connected_voters() {
        use Error::{MemberNotEnoughStarted, Unhealthy};
        let all = &[(2, 6), (3, 6), (4, 6), (5, 6)];
        for (members, connected, is_learner, expected) in [
            ("s", &[][..], false, Ok(())),
            ("s", &[], true, Ok(())),
            ("u", &[], false, Err(MemberNotEnoughStarted)),
            ("su", all, false, Err(MemberNotEnoughStarted)),
            ("su", all, true, Ok(())),
            ("ss", all, false, Ok(())),
            ("ss", &[], false, Err(Unhealthy)),
            ("ss", &[(2, 5)], false, Err(Unhealthy)),
            ("ss", &[], true, Err(Unhealthy)),
            ("sss", &[(2, 6)], false, Err(Unhealthy)),
            ("sss", &[(2, 6), (3, 6)], false, Ok(())),
            ("ssu", &[(2, 6), (3, 6)], false, Err(MemberNotEnoughStarted)),
            ("sssu", &[(2, 6), (3, 6)], false, Ok(())),
            ("ssl", &[(3, 6)], false, Err(Unhealthy)),
        ] {
            let told = check(members, connected, |outlook| outlook.check_addition(is_learner));
            assert_eq!(told, expected, "{members} {connected:?} learner: {is_learner}");
        }
    }

    #[test]
    fn a_removal_must_leave_a_quorum() {
        use Error::{MemberNotEnoughStarted, Unhealthy};
        let all = &[(2, 6), (3, 6), (4, 6), (5, 6)];
        for (members, connected, id, expected) in [
            ("s", &[][..], 1, Err(MemberNotEnoughStarted)),
            ("sl", &[], 2, Ok(())),
            ("ss", all, 2, Ok(())),
            ("ss", all, 1, Ok(())),
            ("ss", &[], 2, Ok(())),
            ("ss", &[], 1, Err(Unhealthy)),
            ("su", &[], 2, Ok(())),
            ("su", &[], 1, Err(MemberNotEnoughStarted)),
            ("su", &[], 9, Err(MemberNotEnoughStarted)),
            ("sss", all, 9, Ok(())),
            ("sss", &[(2, 6)], 3, Ok(())),
            ("sss", &[(2, 6)], 2, Err(Unhealthy)),
            ("sss", &[(2, 6)], 1, Err(Unhealthy)),
            ("sss", all, 1, Ok(())),
            ("sssss", &[(2, 6), (3, 6)], 3, Err(Unhealthy)),
            ("sssss", &[(2, 6), (3, 6), (4, 6)], 3, Ok(())),
        ] {
            let told = check(members, connected, |outlook| outlook.check_removal(id));
            assert_eq!(told, expected, "{members} {connected:?} {id}");
        }
    }

    #[test]
    fn a_promotion_counts_the_learner_as_started() {
        for (members, expected) in [
            ("sl", Ok(())),
            ("ul", Err(Error::MemberNotEnoughStarted)),
            ("sul", Ok(())),
            ("suul", Err(Error::MemberNotEnoughStarted)),
        ] {
            assert_eq!(check(members, &[], |outlook| outlook.check_promotion()), expected, "{members}");
        }
    }
}
