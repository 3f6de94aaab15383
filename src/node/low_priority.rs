//! Threads for work that is expensive on purpose or by nature (passwords, hashes of all data) and that no request of another
//! kind should wait for. They have a low priority, and a bounded number of jobs waits for them: more are refused at once.

use std::{collections::VecDeque, io, sync::Arc, thread};

use parking_lot::{Condvar, Mutex};

/// Added to the priority of the process: whatever serves requests runs first.
const NICE: i32 = 10;

type Job = Box<dyn FnOnce() + Send>;

/// A few threads, and the queue of jobs for them. The threads live as long as the process.
pub struct LowPriorityThreads {
    max_waiting: usize,
    queue: Arc<Queue>,
}

#[derive(Default)]
struct Queue {
    jobs: Mutex<VecDeque<Job>>,
    added: Condvar,
}

impl LowPriorityThreads {
    pub fn start(name: &str, threads: usize, max_waiting: usize) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        for _ in 0..threads {
            let queue = queue.clone();
            thread::Builder::new().name(name.into()).spawn(move || queue.work())?;
        }
        Ok(Self { max_waiting, queue })
    }

    /// How many jobs wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.jobs.lock().len()
    }

    /// How many jobs may wait.
    #[must_use]
    pub fn max_waiting(&self) -> usize {
        self.max_waiting
    }

    /// Runs a job with `waiter` on one of the threads. Gives the waiter back if too many jobs wait already.
    pub fn run<W: Send + 'static>(&self, waiter: W, job: impl FnOnce(W) + Send + 'static) -> Result<(), W> {
        let mut jobs = self.queue.jobs.lock();
        if jobs.len() >= self.max_waiting {
            return Err(waiter);
        }
        jobs.push_back(Box::new(move || job(waiter)));
        drop(jobs);
        self.queue.added.notify_one();
        Ok(())
    }
}

impl Queue {
    fn work(&self) {
        // Without it the jobs would only run as soon as requests do; that is no reason not to run them.
        let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE);
        loop {
            let mut jobs = self.jobs.lock();
            while jobs.is_empty() {
                self.added.wait(&mut jobs);
            }
            let job = jobs.pop_front().expect("it is not empty");
            drop(jobs);
            job();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_beyond_the_queue_are_given_back() {
        let threads = LowPriorityThreads::start("test", 1, 2).unwrap();
        let (release, released) = mpsc::channel::<()>();
        let (started, is_running) = mpsc::channel();
        let (done, outcomes) = mpsc::channel();
        let waits = move |()| {
            started.send(()).unwrap();
            released.recv().unwrap();
        };
        threads.run((), waits).unwrap();
        is_running.recv().unwrap();
        for nth in 0..2 {
            threads.run((done.clone(), nth), |(done, nth)| done.send(nth).unwrap()).unwrap();
        }
        assert_eq!(threads.run(7, |_| unreachable!("it is refused")), Err(7));
        release.send(()).unwrap();
        assert_eq!([outcomes.recv().unwrap(), outcomes.recv().unwrap()], [0, 1], "in order");
    }
}
