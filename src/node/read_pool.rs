//! A few threads for long reads, so that these block neither their connection nor anything else.

use std::{collections::VecDeque, sync::Arc, thread};

use parking_lot::{Condvar, Mutex};

type Job = Box<dyn FnOnce() + Send>;

/// The read pool. Jobs are queued in order. Each belongs to a call, so their number is bounded by the clients' calls.
#[derive(Clone)]
pub struct ReadPool {
    queue: Arc<Queue>,
}

#[derive(Default)]
struct Queue {
    jobs: Mutex<VecDeque<Job>>,
    arrived: Condvar,
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

    /// Runs a job when a thread is free.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        self.queue.jobs.lock().push_back(Box::new(job));
        self.queue.arrived.notify_one();
    }
}

impl Queue {
    fn next(&self) -> Job {
        let mut jobs = self.jobs.lock();
        loop {
            match jobs.pop_front() {
                Some(job) => return job,
                None => self.arrived.wait(&mut jobs),
            }
        }
    }
}
