//! Waiting: every wait has an end, and a wait that fails says what it waited for, for how long, and what it saw last.

use std::{
    env, fmt, thread,
    time::{Duration, Instant},
};

/// The pause between two checks.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The time limit of every wait and request that needs no other.
#[must_use]
pub fn time_limit() -> Duration {
    scaled(Duration::from_mins(1))
}

/// A time limit on this machine: multiplied by `METASTORE_TEST_TIME_SCALE`, for machines that are slow or busy.
#[must_use]
pub fn scaled(limit: Duration) -> Duration {
    limit.mul_f64(scale(env::var("METASTORE_TEST_TIME_SCALE").ok().as_deref()))
}

fn scale(text: Option<&str>) -> f64 {
    let Some(text) = text else { return 1.0 };
    let scale = text.parse().ok().filter(|scale: &f64| scale.is_finite() && *scale > 0.0);
    scale.unwrap_or_else(|| panic!("METASTORE_TEST_TIME_SCALE must be a positive number, not {text:?}"))
}

/// What a check returns: `bool`, `Option`, or a `Result` whose error is the state that a failure prints.
pub trait Outcome {
    /// What is waited for.
    type Value;

    /// The value, or a description of what was found instead; empty if the check returns none.
    fn into_result(self) -> Result<Self::Value, String>;
}

impl Outcome for bool {
    type Value = ();

    fn into_result(self) -> Result<(), String> {
        if self { Ok(()) } else { Err(String::new()) }
    }
}

impl<T> Outcome for Option<T> {
    type Value = T;

    fn into_result(self) -> Result<T, String> {
        self.ok_or_else(String::new)
    }
}

impl<T, E: fmt::Debug> Outcome for Result<T, E> {
    type Value = T;

    fn into_result(self) -> Result<T, String> {
        self.map_err(|state| format!("{state:?}"))
    }
}

/// Repeats `check` until it succeeds; returns its value. After `limit`, which is [`scaled`], the test fails. `what` completes the
/// sentence "waited until".
#[track_caller]
pub fn eventually<O: Outcome>(what: &str, limit: Duration, mut check: impl FnMut() -> O) -> O::Value {
    let limit = scaled(limit);
    let started = Instant::now();
    loop {
        match check().into_result() {
            Ok(value) => return value,
            Err(state) if started.elapsed() >= limit => fail(what, limit, &state),
            Err(_) => thread::sleep(POLL_INTERVAL),
        }
    }
}

/// The same for checks that await something. A check that does not return by the end of `limit` fails, too.
pub async fn eventually_async<O: Outcome>(what: &str, limit: Duration, mut check: impl AsyncFnMut() -> O) -> O::Value {
    let limit = scaled(limit);
    let end = tokio::time::Instant::now() + limit;
    let mut last = String::from("nothing, because the first check did not return");
    loop {
        let Ok(outcome) = tokio::time::timeout_at(end, check()).await else { fail(what, limit, &last) };
        match outcome.into_result() {
            Ok(value) => return value,
            Err(state) => last = state,
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

#[track_caller]
fn fail(what: &str, limit: Duration, last: &str) -> ! {
    let last = if last.is_empty() { String::new() } else { format!("; the last check found {last}") };
    panic!("waited {limit:?} until {what}{last}")
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    fn message(failure: Box<dyn std::any::Any + Send>) -> String {
        *failure.downcast().expect("a formatted message")
    }

    #[test]
    fn a_wait_ends_with_the_first_success() {
        let mut checks = 0;
        let value = eventually("it is the third check", time_limit(), || {
            checks += 1;
            (checks == 3).then_some("value")
        });
        assert_eq!((value, checks), ("value", 3));
    }

    #[test]
    fn a_failure_says_what_was_waited_for_and_what_was_found() {
        let failure = catch_unwind(|| eventually("it is ready", SHORT, || Err::<(), _>([1, 2])));
        let text = message(failure.unwrap_err());
        assert!(
            text.starts_with("waited ") && text.ends_with(" until it is ready; the last check found [1, 2]"),
            "{text}"
        );
        let failure = catch_unwind(|| eventually("it is ready", SHORT, || false));
        let text = message(failure.unwrap_err());
        assert!(text.ends_with(" until it is ready"), "{text}");
    }

    #[test]
    fn a_check_that_never_returns_fails_too() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let wait =
            || runtime.block_on(eventually_async("it answers", SHORT, async || std::future::pending::<bool>().await));
        let text = message(catch_unwind(AssertUnwindSafe(wait)).unwrap_err());
        assert!(text.contains("until it answers; the last check found nothing"), "{text}");
    }

    #[test]
    fn the_scale_is_a_positive_number() {
        assert!((scale(None) - 1.0).abs() < f64::EPSILON && (scale(Some("2.5")) - 2.5).abs() < f64::EPSILON);
        for wrong in ["", "0", "-1", "inf", "fast"] {
            assert!(catch_unwind(|| scale(Some(wrong))).is_err(), "{wrong:?}");
        }
    }
}
