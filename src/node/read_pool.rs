//! A few threads for long reads, so that these block neither their connection nor anything else.
//!
//! Jobs wait in lanes, one for each connection, which take turns: a client that asks for a thousand long reads at once delays
//! those of another client by one job per thread, and not by a thousand.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    thread,
};

use parking_lot::{Condvar, Mutex};

type Job = Box<dyn FnOnce() + Send>;

/// The lane of jobs that belong to no connection.
const NO_CONNECTION: usize = 0;

/// The read pool. Each job belongs to a call, so their number is bounded by the clients' calls.
#[derive(Clone)]
pub struct ReadPool {
    queue: Arc<Queue>,
}

#[derive(Default)]
struct Queue {
    jobs: Mutex<Jobs>,
    arrived: Condvar,
}

/// The jobs of each lane, in order. No lane is empty.
#[derive(Default)]
struct Jobs {
    lanes: HashMap<usize, VecDeque<Job>>,
    /// Each lane once; the first one is next.
    turns: VecDeque<usize>,
}

impl ReadPool {
    /// Starts `threads` threads, which live as long as the process.
    #[must_use]
    pub fn start(threads: usize) -> Self {
        let queue = Arc::new(Queue::default());
        for nth in 0..threads {
            let queue = queue.clone();
            let name = format!("read-{nth}");
            let run = move || {
                loop {
                    queue.next()();
                }
            };
            thread::Builder::new().name(name).spawn(run).expect("the system can start a handful of threads");
        }
        Self { queue }
    }

    /// How many jobs wait for a thread.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.jobs.lock().lanes.values().map(VecDeque::len).sum()
    }

    /// Runs a job that belongs to no connection when a thread is free.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        self.run_in_lane(NO_CONNECTION, job);
    }

    /// Runs a job when a thread is free and it is the turn of its lane: any number that identifies a connection.
    pub fn run_in_lane(&self, lane: usize, job: impl FnOnce() + Send + 'static) {
        self.queue.jobs.lock().push(lane, Box::new(job));
        self.queue.arrived.notify_one();
    }
}

impl Jobs {
    fn push(&mut self, lane: usize, job: Job) {
        let jobs = self.lanes.entry(lane).or_default();
        if jobs.is_empty() {
            self.turns.push_back(lane);
        }
        jobs.push_back(job);
    }

    fn pop(&mut self) -> Option<Job> {
        let lane = self.turns.pop_front()?;
        let jobs = self.lanes.get_mut(&lane).expect("it has a turn because it is not empty");
        let job = jobs.pop_front();
        if jobs.is_empty() {
            self.lanes.remove(&lane);
        } else {
            self.turns.push_back(lane);
        }
        job
    }
}

impl Queue {
    fn next(&self) -> Job {
        let mut jobs = self.jobs.lock();
        loop {
            match jobs.pop() {
                Some(job) => return job,
                None => self.arrived.wait(&mut jobs),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn connections_take_turns() {
        let (done, outcomes) = mpsc::channel();
        let mut jobs = Jobs::default();
        for (lane, name) in [(7, "a1"), (7, "a2"), (7, "a3"), (8, "b1"), (NO_CONNECTION, "c1"), (8, "b2")] {
            let done = done.clone();
            jobs.push(lane, Box::new(move || done.send(name).unwrap()));
        }
        while let Some(job) = jobs.pop() {
            job();
        }
        drop(done);
        assert_eq!(outcomes.iter().collect::<Vec<_>>(), ["a1", "b1", "c1", "a2", "b2", "a3"]);
        assert!(jobs.lanes.is_empty() && jobs.turns.is_empty());
    }

    #[test]
    fn a_job_runs_on_a_thread_of_the_pool() {
        let pool = ReadPool::start(1);
        let (done, outcome) = mpsc::channel();
        pool.run(move || done.send(thread::current().name().map(str::to_owned)).unwrap());
        assert_eq!(outcome.recv().unwrap().as_deref(), Some("read-0"));
    }
}
