//! Which membership changes could lose the quorum: the rules of `--strict-reconfig-check`.
//!
//! Two conditions are checked before anything is proposed. Enough *started* voters must be left (a member has started once it
//! has published its name). And this member must have been *connected* to a quorum of the voters for long enough that they can
//! be taken to be alive.

use std::time::Duration;

use crate::{error::Error, state::Members};

/// A connection counts once it is older than this.
const HEALTHY_AFTER: Duration = Duration::from_secs(5);

/// Checks membership changes, from the point of view of one member.
pub struct ReconfigCheck<'a, Connected> {
    pub members: &'a Members,
    /// The ID of this member.
    pub this: u64,
    /// For how long another member has been connected to this one; None if it is not.
    pub connected: Connected,
}

impl<Connected: Fn(u64) -> Option<Duration>> ReconfigCheck<'_, Connected> {
    /// Whether a member may be added.
    pub fn check_addition(&self, is_learner: bool) -> Result<(), Error> {
        let (voters, started) = self.count_voters(None);
        // A second member can always be added: a cluster that was restored from a backup grows from one member.
        let is_second = voters == 1 && started == 1;
        if !is_learner && !is_second && started < majority(voters + 1) {
            return Err(Error::MemberNotEnoughStarted);
        }
        if voters > 1 && self.healthy_voters() < majority(voters + 1) {
            return Err(Error::Unhealthy);
        }
        Ok(())
    }

    /// Whether a member may be removed. One that does not exist is treated as one that is down.
    pub fn check_removal(&self, id: u64) -> Result<(), Error> {
        if self.members.get(id).is_some_and(|member| member.is_learner) {
            return Ok(());
        }
        let (left, started) = self.count_voters(Some(id));
        if started < majority(left) {
            return Err(Error::MemberNotEnoughStarted);
        }
        if id != self.this && (self.connected)(id).is_none() {
            return Ok(()); // A member that is down does not count as healthy, so removing it takes nothing away.
        }
        let (voters, _) = self.count_voters(None);
        if self.healthy_voters() < 1 + majority(voters.saturating_sub(1)) {
            return Err(Error::Unhealthy);
        }
        Ok(())
    }

    /// Whether a learner may be promoted. The learner counts as started.
    pub fn check_promotion(&self) -> Result<(), Error> {
        let (voters, started) = self.count_voters(None);
        if started + 1 < majority(voters + 1) { Err(Error::MemberNotEnoughStarted) } else { Ok(()) }
    }

    /// The number of voters, not counting `without`, and how many of them have started.
    fn count_voters(&self, without: Option<u64>) -> (usize, usize) {
        let voters = || self.members.voters().filter(|member| Some(member.id) != without);
        (voters().count(), voters().filter(|member| !member.name.is_empty()).count())
    }

    /// The number of healthy voters, including this one.
    fn healthy_voters(&self) -> usize {
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

    /// `members` has one character per member, with IDs from 1 on: `s`tarted and `u`nstarted voters, `l`earners. The check is
    /// made by member 1, which is connected to those in `connected`.
    fn check<T>(
        members: &str,
        connected: &[(u64, u64)],
        run: impl FnOnce(ReconfigCheck<'_, &dyn Fn(u64) -> Option<Duration>>) -> T,
    ) -> T {
        let members = Members::new(members.chars().zip(1..).map(|(kind, id)| Member {
            id,
            name: if kind == 'u' { String::new() } else { id.to_string() },
            is_learner: kind == 'l',
            ..Member::default()
        }));
        let links = |id| connected.iter().find(|(member, _)| *member == id).map(|(_, age)| Duration::from_secs(*age));
        run(ReconfigCheck { members: &members, this: 1, connected: &links })
    }

    /// FAULT-38, with the two tests below.
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
            let result = check(members, connected, |check| check.check_addition(is_learner));
            assert_eq!(result, expected, "{members} {connected:?} learner: {is_learner}");
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
            let result = check(members, connected, |check| check.check_removal(id));
            assert_eq!(result, expected, "{members} {connected:?} {id}");
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
            assert_eq!(check(members, &[], |check| check.check_promotion()), expected, "{members}");
        }
    }
}
