//! Raft, log and apply on one thread, for a member that has nobody to talk to.
//!
//! Three threads let a leader hear its followers while its own disk works, and sync one group while the last one is applied. A
//! sole voter has no followers, and on a busy machine the processors are the limit, not the disk: there each hop between
//! threads costs a wake-up on both sides and buys nothing. Proposals gather in the inbox while this thread is busy, exactly
//! as they do while the log thread is.
//!
//! What is committed is applied and answered before the next group is synced.

use std::time::Instant;

use super::{
    applier::Applier,
    driver::{Driver, LogWriter},
};
use crate::{error::Halt, state::Machine};

/// Runs until the raft inbox is closed; returns the machine, or why this node cannot go on.
pub fn run(mut driver: Driver, mut writer: LogWriter, mut applier: Applier) -> Result<Machine, Halt> {
    let (mut inputs, mut tasks, mut handoffs) = (Vec::new(), Vec::new(), Vec::new());
    let mut next_tick = Instant::now() + driver.tick;
    while driver.inbox.receive(&mut inputs, Some(next_tick)) {
        loop {
            let ticks = driver.ticks_due(&mut next_tick);
            driver.take(&mut inputs, ticks);
            driver.applier.drain(&mut handoffs);
            driver.log.drain(&mut tasks);
            if tasks.is_empty() && handoffs.is_empty() {
                break;
            }
            applier.take(&mut handoffs, Instant::now())?;
            writer.take(&mut tasks)?;
            // "Persisted", and whatever came while the disk worked.
            driver.inbox.drain(&mut inputs);
        }
    }
    applier.waiters.stop();
    Ok(applier.machine)
}
