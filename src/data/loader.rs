//! Batches for training, made by threads ahead of need.
//!
//! Batch number p is a pure function of source, seed and p: it is the same whatever the number of threads, and a run that
//! is taken up at p goes on as if it had never stopped. Pictures come in one long row, epoch after epoch, each epoch in an
//! order of its own; batch p is the p-th piece of that row, so an epoch's end may lie inside a batch, and none is left out.

use super::shapes::LabelledBox;
use super::source::{Extras, Sample, Source};
use crate::error::{Error, Result};
use crate::rng::Small;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Pictures that are tried in place of one that cannot be read.
const TRIES: u64 = 64;

/// What a loader is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Pictures of a batch.
    pub batch: usize,
    /// Of the order, and of what transforms leave to chance.
    pub seed: u64,
    /// Whether each epoch has a random order; else that of the source.
    pub shuffle: bool,
    /// Threads that make batches; 0 for as many as there are cores.
    pub threads: usize,
    /// Batches that are made or being made ahead of need, at most: what the loader holds in memory.
    pub ahead: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { batch: 1, seed: 0, shuffle: true, threads: 0, ahead: 8 }
    }
}

/// B pictures with what is known of them.
#[derive(Clone, PartialEq, Debug)]
pub struct Batch {
    /// Its number.
    pub position: u64,
    /// The epoch of its first picture; 0 where there is no end.
    pub epoch: u64,
    /// Side S of the pictures, in pixels.
    pub side: usize,
    /// Shape (B,S,S,3), from −1 to 1.
    pub images: Vec<f32>,
    /// B texts; empty ones where nothing is said.
    pub captions: Vec<String>,
    /// B classes; `None` where the source has none.
    pub classes: Option<Vec<usize>>,
    /// For each picture, its boxes.
    pub boxes: Option<Vec<Vec<LabelledBox>>>,
    /// Labels, shape (B,S,S).
    pub semantic_maps: Option<Vec<u8>>,
    /// Smaller pictures, shape (B,s,s,3), from −1 to 1.
    pub low_resolution: Option<Vec<f32>>,
    /// 1 in the holes to paint and 0 outside, shape (B,S,S,1).
    pub masks: Option<Vec<f32>>,
}

/// An endless iterator of batches. Its position is all its state. Dropping it ends its threads.
pub struct Loader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    position: u64,
    waited: Duration,
}

struct Shared {
    source: Box<dyn Source>,
    options: Options,
    queue: Mutex<Queue>,
    /// A batch has become ready.
    ready: Condvar,
    /// A batch has been taken, or the loader is dropped.
    room: Condvar,
    stop: AtomicBool,
    /// What could not be read, by number of picture.
    skipped: Mutex<BTreeMap<u64, String>>,
}

struct Queue {
    /// The next batch to be made.
    next: u64,
    /// The batch that the consumer waits for.
    wanted: u64,
    made: BTreeMap<u64, Result<Batch>>,
}

impl Loader {
    /// A loader that starts with batch number `position`: 0, or where an earlier run has stopped.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a batch of 0, for nothing ahead, for an empty source or pictures of 0 pixels, for a position beyond any run, and when
    /// threads cannot be started.
    pub fn at(source: impl Source, options: Options, position: u64) -> Result<Loader> {
        for (what, n) in [
            ("picture per batch", options.batch),
            ("batch ahead", options.ahead),
            ("pixel as the size of pictures", source.side()),
        ] {
            if n == 0 {
                return Err(Error::invalid(format!("data: want at least 1 {what}; got 0")));
            }
        }
        if source.is_empty() {
            return Err(Error::invalid("data: want at least one picture; the source has none"));
        }
        // So that no number of a picture overflows.
        let most = u64::MAX / 4 / options.batch as u64;
        if position > most {
            return Err(Error::invalid(format!("data: want a position of at most {most}; got {position}")));
        }
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
        let count = if options.threads == 0 { cores() } else { options.threads }.min(options.ahead);
        let shared = Arc::new(Shared {
            source: Box::new(source),
            options,
            queue: Mutex::new(Queue { next: position, wanted: position, made: BTreeMap::new() }),
            ready: Condvar::new(),
            room: Condvar::new(),
            stop: AtomicBool::new(false),
            skipped: Mutex::new(BTreeMap::new()),
        });
        let mut loader = Loader { shared, threads: vec![], position, waited: Duration::ZERO };
        for i in 0..count {
            let shared = loader.shared.clone();
            let thread = std::thread::Builder::new().name(format!("data-{i}"));
            let thread = thread.spawn(move || shared.work());
            let thread = thread
                .map_err(|e| Error::invalid(format!("data: {count} threads cannot be started: {e}")))?;
            loader.threads.push(thread);
        }
        Ok(loader)
    }

    /// The number of the next batch: a run that is taken up later starts there.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// How long [`Iterator::next`] has waited for batches in all. Where it grows as fast as the clock, data are what limits
    /// the run.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// What was said of each picture that could not be read so far, with its file. Another one stood in for it each time.
    pub fn skipped(&self) -> Vec<String> {
        lock(&self.shared.skipped).values().cloned().collect()
    }
}

impl Iterator for Loader {
    type Item = Result<Batch>;

    /// The next batch, or why it could not be made. Never `None`.
    fn next(&mut self) -> Option<Result<Batch>> {
        let start = Instant::now();
        let mut queue = lock(&self.shared.queue);
        let batch = loop {
            match queue.made.remove(&self.position) {
                Some(batch) => break batch,
                None => queue = self.shared.ready.wait(queue).unwrap_or_else(PoisonError::into_inner),
            }
        };
        self.position += 1;
        queue.wanted = self.position;
        drop(queue);
        self.shared.room.notify_all();
        self.waited += start.elapsed();
        Some(batch)
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // Under the lock, so that no thread goes to sleep between its look at `stop` and its wait.
        let queue = lock(&self.shared.queue);
        self.shared.stop.store(true, Ordering::Relaxed);
        drop(queue);
        self.shared.room.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// What a mutex guards is whole at every moment here, also where a thread has panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// A thread's life: it takes the number of a batch, makes it, and puts it where the consumer looks.
    fn work(&self) {
        loop {
            let mut queue = lock(&self.queue);
            while !self.stopped() && queue.next >= queue.wanted + self.options.ahead as u64 {
                queue = self.room.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            if self.stopped() {
                return;
            }
            let position = queue.next;
            queue.next += 1;
            drop(queue);
            let batch = self.batch(position);
            lock(&self.queue).made.insert(position, batch);
            self.ready.notify_all();
        }
    }

    fn batch(&self, position: u64) -> Result<Batch> {
        let first = position * self.options.batch as u64;
        let mut samples = Vec::with_capacity(self.options.batch);
        for number in first..first + self.options.batch as u64 {
            if self.stopped() {
                return Err(Error::Cancelled);
            }
            samples.push(self.sample(number)?);
        }
        let epoch = self.source.len().map_or(0, |n| first / n);
        collect(position, epoch, self.source.side(), samples)
    }

    /// Picture `number` of the row. One that cannot be read is noted, and the next of its epoch that can be stands in.
    fn sample(&self, number: u64) -> Result<Sample> {
        let Options { seed, shuffle, .. } = self.options;
        let draw =
            |stream: u64| Small::new(Small::new(Small::new(seed).u64() ^ stream).u64().wrapping_add(number));
        let Some(len) = self.source.len() else {
            return self.read(number, &mut draw(1));
        };
        let (epoch, place) = (number / len, number % len);
        let mut first = None;
        for k in 0..len.min(TRIES) {
            let place = (place + k) % len;
            let index = if shuffle { shuffled(place, len, seed, epoch) } else { place };
            match self.read(index, &mut draw(1)) {
                Err(e @ Error::File { .. }) => {
                    lock(&self.skipped).entry(index).or_insert_with(|| e.to_string());
                    first = first.or(Some(e));
                }
                other => return other,
            }
        }
        let first = first.map_or(String::new(), |e| e.to_string());
        Err(Error::invalid(format!(
            "data: {} pictures in a row cannot be read; the first: {first}",
            len.min(TRIES)
        )))
    }

    fn read(&self, index: u64, draw: &mut Small) -> Result<Sample> {
        catch_unwind(AssertUnwindSafe(|| self.source.sample(index, draw)))
            .unwrap_or_else(|_| Err(Error::invalid(format!("data: reading picture {index} has panicked"))))
    }
}

/// Where `place` of 0 to `len` − 1, `len` at least 1, comes to lie in the order of an epoch: a permutation that is computed and not stored (a
/// Feistel network over the next power of 4, walked until it falls inside).
pub fn shuffled(place: u64, len: u64, seed: u64, epoch: u64) -> u64 {
    let half = (u64::BITS - (len - 1).leading_zeros()).div_ceil(2);
    let mask = (1u64 << half) - 1;
    let key = Small::new(Small::new(seed).u64().wrapping_add(epoch)).u64();
    let mut x = place;
    loop {
        let (mut left, mut right) = (x >> half, x & mask);
        for round in 0..8u64 {
            let mixed = Small::new(key ^ (right << 8 | round)).u64() & mask;
            (left, right) = (right, left ^ mixed);
        }
        x = left << half | right;
        if x < len {
            return x;
        }
    }
}

/// 0 to 255 as −1 to 1.
fn signed(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.iter().map(|v| f32::from(*v) / 127.5 - 1.0)
}

fn collect(position: u64, epoch: u64, side: usize, samples: Vec<Sample>) -> Result<Batch> {
    let mut images = Vec::with_capacity(samples.len() * side * side * 3);
    for s in &samples {
        if s.pixels.len() != side * side * 3 {
            let got = s.pixels.len();
            return Err(Error::invalid(format!("data: want {side}x{side}x3 bytes per picture; got {got}")));
        }
        images.extend(signed(&s.pixels));
    }
    /// All pictures' parts joined, where each has one.
    fn joined<'a, T, I: IntoIterator<Item = T>>(
        samples: &'a [Sample],
        part: impl Fn(&'a Sample) -> Option<I>,
    ) -> Option<Vec<T>> {
        let parts: Option<Vec<I>> = samples.iter().map(part).collect();
        Some(parts?.into_iter().flatten().collect())
    }
    fn bytes<'a>(samples: &'a [Sample], part: impl Fn(&'a Extras) -> &'a Option<Vec<u8>>) -> Option<Vec<u8>> {
        joined(samples, |s| part(&s.extras).as_ref().map(|v| v.iter().copied()))
    }
    Ok(Batch {
        position,
        epoch,
        side,
        images,
        classes: samples.iter().map(|s| s.class).collect(),
        boxes: samples.iter().map(|s| s.extras.boxes.clone()).collect(),
        semantic_maps: bytes(&samples, |e| &e.semantic_map),
        low_resolution: bytes(&samples, |e| &e.low_resolution).map(|v| signed(&v).collect()),
        masks: bytes(&samples, |e| &e.mask).map(|v| v.into_iter().map(f32::from).collect()),
        captions: samples.into_iter().map(|s| s.caption).collect(),
    })
}

#[cfg(test)]
mod tests;
