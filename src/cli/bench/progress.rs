//! Shows progress on stderr: a bar on a terminal, otherwise a line from time to time.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{report::thousands, schedule::Extent};

/// Time between two lines if stderr is not a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// The progress of one phase.
pub(super) struct Progress {
    title: String,
    extent: Extent,
    started: Instant,
    bar: Option<ProgressBar>,
    next_line: Instant,
    latest: (Instant, u64),
}

impl Progress {
    pub(super) fn start(title: String, extent: Extent) -> Self {
        let started = Instant::now();
        let bar = io::stderr().is_terminal().then(|| bar(&title));
        Self { title, extent, started, bar, next_line: started + LINE_INTERVAL, latest: (started, 0) }
    }

    /// Updates the display: `calls` have completed, of which `failed` have failed, and the report counts `counted` so far.
    pub(super) fn show(&mut self, calls: u64, counted: u64, failed: u64) {
        let now = Instant::now();
        if self.bar.is_none() && now < self.next_line {
            return;
        }
        self.next_line = now + LINE_INTERVAL;
        let seconds = (now - self.latest.0).as_secs_f64().max(1e-3);
        let speed = speed(counted - self.latest.1, seconds);
        self.latest = (now, counted);
        let failures = if failed == 0 { String::new() } else { format!(", {} FAILED", thousands(failed)) };
        let message = format!("{} done, {}/s{failures}", thousands(counted), thousands(speed));
        match &self.bar {
            Some(bar) => {
                bar.set_position(permille(self.extent, now - self.started, calls));
                bar.set_message(message);
            }
            None => eprintln!("{}: {:.0} s, {message}", self.title, (now - self.started).as_secs_f64()),
        }
    }

    /// Removes the bar, before the report is printed.
    pub(super) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(title: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(1000), ProgressDrawTarget::stderr_with_hz(5));
    let style = ProgressStyle::with_template("{prefix} {wide_bar} {percent:>3}%  {msg}");
    bar.set_style(style.expect("the template is valid"));
    bar.set_prefix(title.to_owned());
    bar
}

fn permille(extent: Extent, elapsed: Duration, calls: u64) -> u64 {
    let (done, all) = match extent {
        Extent::Calls(total) => (u128::from(calls), u128::from(total)),
        Extent::Time(time) => (elapsed.as_nanos(), time.as_nanos()),
    };
    u64::try_from((done * 1000 / all.max(1)).min(1000)).expect("it is at most a thousand")
}

#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "for display only"
)]
fn speed(count: u64, seconds: f64) -> u64 {
    (count as f64 / seconds).round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_follows_calls_or_time_and_never_overshoots() {
        assert_eq!(permille(Extent::Calls(200), Duration::ZERO, 50), 250);
        assert_eq!(permille(Extent::Time(Duration::from_secs(4)), Duration::from_secs(1), 9), 250);
        assert_eq!(permille(Extent::Time(Duration::from_secs(4)), Duration::from_secs(9), 9), 1000);
    }
}
