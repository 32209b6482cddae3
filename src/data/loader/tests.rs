use super::super::folder::Folder;
use super::super::shapes::{LABELS, Split, World};
use super::super::source::{Drawn, Pictures};
use super::super::transform::Transform;
use super::*;
use crate::io::png::encode_rgb8;
use crate::io::scratch::Scratch;
use std::collections::BTreeSet;
use std::sync::atomic::AtomicUsize;

/// A source whose picture says its number and what chance gave it; `broken` ones cannot be read.
struct Numbers {
    len: Option<u64>,
    broken: fn(u64) -> Option<Error>,
    delay: Duration,
    made: Arc<AtomicUsize>,
}

impl Numbers {
    fn new(len: Option<u64>) -> Numbers {
        Numbers { len, broken: |_| None, delay: Duration::ZERO, made: Arc::default() }
    }
}

impl Source for Numbers {
    fn len(&self) -> Option<u64> {
        self.len
    }

    fn side(&self) -> usize {
        1
    }

    fn sample(&self, index: u64, draw: &mut Small) -> Result<Sample> {
        self.made.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(self.delay);
        if let Some(e) = (self.broken)(index) {
            return Err(e);
        }
        let pixels = vec![index as u8, draw.below(256) as u8, 0];
        Ok(Sample { pixels, caption: index.to_string(), ..Sample::default() })
    }
}

fn options(batch: usize, threads: usize) -> Options {
    Options { batch, threads, seed: 5, ..Options::default() }
}

fn take(source: impl Source, options: Options, from: u64, n: usize) -> Vec<Batch> {
    Loader::at(source, options, from).unwrap().take(n).map(Result::unwrap).collect()
}

#[test]
fn batches_depend_on_seed_and_position_alone() {
    let whole = take(Numbers::new(Some(23)), options(4, 1), 0, 20);
    for (threads, ahead) in [(1, 1), (2, 1), (3, 8), (8, 8), (0, 3)] {
        let o = Options { ahead, ..options(4, threads) };
        assert!(take(Numbers::new(Some(23)), o, 0, 20) == whole, "{threads} threads");
        for from in [1, 7, 19] {
            assert!(take(Numbers::new(Some(23)), o, from, 20 - from as usize) == whole[from as usize..]);
        }
    }
    assert_eq!(whole.iter().map(|b| b.position).collect::<Vec<_>>(), (0..20).collect::<Vec<_>>());
    let other = Options { seed: 6, ..options(4, 1) };
    assert!(take(Numbers::new(Some(23)), other, 0, 20) != whole);
    // A change of the size of the batch leaves the row of pictures as it is.
    let flat = |all: &[Batch]| all.iter().flat_map(|b| b.images.clone()).collect::<Vec<_>>();
    assert!(flat(&take(Numbers::new(Some(23)), options(8, 2), 0, 10)) == flat(&whole));
}

#[test]
fn each_epoch_has_every_picture_once_in_an_order_of_its_own() {
    let all = take(Numbers::new(Some(10)), options(4, 2), 0, 15);
    let row: Vec<String> = all.iter().flat_map(|b| b.captions.clone()).collect();
    let mut orders = BTreeSet::new();
    for epoch in row.chunks(10) {
        assert_eq!(epoch.iter().collect::<BTreeSet<_>>().len(), 10, "{epoch:?}");
        orders.insert(epoch.to_vec());
    }
    assert_eq!(orders.len(), 6, "the same order twice");
    assert_eq!(
        all.iter().map(|b| b.epoch).collect::<Vec<_>>(),
        [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 5]
    );
    // Chance is drawn anew in each epoch.
    let chances: BTreeSet<u32> =
        all.iter().flat_map(|b| b.images.chunks(3).map(|p| p[1].to_bits())).collect();
    assert!(chances.len() > 40, "{}", chances.len());
    let plain = Options { shuffle: false, ..options(3, 2) };
    let row: Vec<String> =
        take(Numbers::new(Some(4)), plain, 0, 3).iter().flat_map(|b| b.captions.clone()).collect();
    assert_eq!(row.concat(), "012301230");
}

#[test]
fn the_order_is_a_permutation_and_looks_random() {
    for len in (1..40).chain([64, 65, 1000, 4096]) {
        let all: BTreeSet<u64> = (0..len).map(|i| shuffled(i, len, 3, 9)).collect();
        assert_eq!((all.len() as u64, all.last().copied()), (len, Some(len - 1)));
    }
    // Where a place goes is even over the epochs, and neighbours do not stay together.
    let (len, epochs) = (10, 5000);
    let mut hits = vec![0; 100];
    let mut together = 0;
    for epoch in 0..epochs {
        for i in 0..len {
            hits[(i * len + shuffled(i, len, 1, epoch)) as usize] += 1;
        }
        together += u64::from(shuffled(4, len, 1, epoch).abs_diff(shuffled(5, len, 1, epoch)) == 1);
    }
    assert!(hits.iter().all(|n| (400..600).contains(n)), "{hits:?}");
    assert!((800..1200).contains(&together), "{together}, want about 1000");
}

#[test]
fn what_cannot_be_read_is_named_and_another_stands_in() {
    let broken = |i: u64| (i % 3 == 1).then(|| Error::file(format!("{i}.png"), "broken"));
    let source = || Numbers { broken, ..Numbers::new(Some(9)) };
    let mut loader = Loader::at(source(), options(9, 2), 0).unwrap();
    let first = loader.next().unwrap().unwrap();
    assert_eq!(first.captions.len(), 9);
    assert!(first.captions.iter().all(|c| c.parse::<u64>().unwrap() % 3 != 1));
    assert_eq!(first.captions.iter().collect::<BTreeSet<_>>().len(), 6);
    let more: Vec<Batch> = loader.by_ref().take(5).map(Result::unwrap).collect();
    assert_eq!(loader.skipped(), ["1.png: broken", "4.png: broken", "7.png: broken"]);
    // Also a run that is taken up has the same pictures.
    assert!(take(source(), options(9, 1), 1, 5) == more);
}

#[test]
fn errors_reach_the_consumer() {
    let next = |broken: fn(u64) -> Option<Error>| {
        let mut loader = Loader::at(Numbers { broken, ..Numbers::new(Some(100)) }, options(2, 2), 0).unwrap();
        let e = loader.find_map(Result::err).unwrap().to_string();
        // Whoever goes on gets the next batch, or its error; nobody waits for ever.
        let _ = loader.next().unwrap();
        e
    };
    let e = next(|_| Some(Error::file("x.png", "broken")));
    assert!(e.contains("64 pictures in a row cannot be read; the first: x.png: broken"), "{e}");
    assert_eq!(next(|i| (i == 50).then(|| Error::invalid("something else"))), "something else");
    let e = next(|i| if i == 50 { panic!("oh") } else { None });
    assert!(e.contains("reading picture 50 has panicked"), "{e}");
}

#[test]
fn the_queue_is_bounded_and_no_thread_outlives_the_loader() {
    let source = Numbers::new(None);
    let made = source.made.clone();
    let mut loader = Loader::at(source, Options { ahead: 3, ..options(4, 8) }, 0).unwrap();
    let settled = |want: usize| {
        let start = Instant::now();
        while made.load(Ordering::SeqCst) < want && start.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(30));
        made.load(Ordering::SeqCst)
    };
    assert_eq!(settled(12), 12);
    loader.next().unwrap().unwrap();
    assert_eq!(settled(16), 16);
    drop(loader);
    // The source is a part of what the threads share: with the last thread it is gone.
    assert_eq!(Arc::strong_count(&made), 1);
    // Also in the middle of a long batch.
    let source = Numbers { delay: Duration::from_millis(5), ..Numbers::new(None) };
    let made = source.made.clone();
    let start = Instant::now();
    drop(Loader::at(source, options(100_000, 2), 0).unwrap());
    assert!(start.elapsed() < Duration::from_secs(10) && Arc::strong_count(&made) == 1);
}

#[test]
fn the_wait_is_measured() {
    let slow = Numbers { delay: Duration::from_millis(20), ..Numbers::new(None) };
    let mut loader = Loader::at(slow, options(2, 1), 0).unwrap();
    assert_eq!(loader.waited(), Duration::ZERO);
    loader.next().unwrap().unwrap();
    assert!(loader.waited() >= Duration::from_millis(30), "{:?}", loader.waited());
    let before = loader.waited();
    // By now it is ready: what is left is the call.
    std::thread::sleep(Duration::from_millis(400));
    loader.next().unwrap().unwrap();
    assert!(loader.waited() - before < Duration::from_millis(200), "{:?}", loader.waited() - before);
    assert_eq!(loader.position(), 2);
}

#[test]
fn requests_that_cannot_be_met_are_refused() {
    let text = |o: Options, len: u64, from: u64| {
        Loader::at(Numbers::new(Some(len)), o, from).err().map(|e| e.to_string()).unwrap_or_default()
    };
    let dir = Scratch::new("loader");
    dir.file("a.png", "");
    let none = Pictures::new(Folder::open(dir.path()).unwrap(), Transform::center(0));
    let e = Loader::at(none, options(1, 1), 0).err().unwrap().to_string();
    assert!(e.contains("at least 1 pixel as the size of pictures; got 0"), "{e}");
    assert!(text(options(0, 1), 1, 0).contains("at least 1 picture per batch; got 0"));
    assert!(text(Options { ahead: 0, ..options(1, 1) }, 1, 0).contains("at least 1 batch ahead"));
    assert!(text(options(1, 1), 0, 0).contains("at least one picture"));
    assert!(text(options(2, 1), 1, u64::MAX).contains("want a position of at most"));
    let world = World::new(0, 64, Split::Train).unwrap();
    assert!(
        Drawn::new(world)
            .with_low_resolution(5)
            .unwrap_err()
            .to_string()
            .contains("divides the size of 64; got 5")
    );
}

#[test]
fn drawn_batches_have_all_that_is_known() {
    let world = World::new(1, 32, Split::Train).unwrap();
    let source = Drawn::new(world).with_extras().with_low_resolution(4).unwrap();
    let batch = take(source, options(3, 2), 2, 1).remove(0);
    let scenes: Vec<_> = (6..9).map(|i| world.scene(i)).collect();
    assert_eq!(batch.captions, scenes.iter().map(|s| s.caption()).collect::<Vec<_>>());
    assert_eq!(batch.classes, Some(scenes.iter().map(|s| s.class()).collect()));
    assert_eq!(batch.boxes, Some(scenes.iter().map(|s| s.boxes()).collect()));
    assert_eq!((batch.side, batch.images.len()), (32, 3 * 32 * 32 * 3));
    let back: Vec<u8> = batch.images.iter().map(|v| ((v + 1.0) * 127.5).round() as u8).collect();
    assert_eq!(back, scenes.iter().flat_map(|s| s.draw()).collect::<Vec<_>>());
    let maps = batch.semantic_maps.unwrap();
    assert!(maps.len() == 3 * 32 * 32 && maps.iter().all(|v| (*v as usize) < LABELS));
    let (low, masks) = (batch.low_resolution.unwrap(), batch.masks.unwrap());
    assert_eq!((low.len(), masks.len()), (3 * 8 * 8 * 3, 3 * 32 * 32));
    assert!(low.iter().all(|v| v.abs() <= 1.0) && masks.iter().all(|v| *v == 0.0 || *v == 1.0));
    let plain = take(Drawn::new(world), options(3, 1), 2, 1).remove(0);
    assert!(plain.images == batch.images && plain.masks.is_none() && plain.boxes.is_none());
}

#[test]
fn folders_become_batches() {
    let dir = Scratch::new("loader");
    for (name, v) in [("a/0.png", 0), ("a/1.png", 51), ("b/2.png", 255)] {
        dir.file(name, encode_rgb8(40, 24, &[v; 40 * 24 * 3], None).unwrap());
    }
    dir.file("b/torn.png", &encode_rgb8(8, 8, &[9; 192], None).unwrap()[..60]);
    let source = || Pictures::new(Folder::open(dir.path()).unwrap(), Transform::square(16));
    let mut loader = Loader::at(source().with_low_resolution(4).unwrap(), options(4, 2), 0).unwrap();
    let batch = loader.next().unwrap().unwrap();
    let classes = batch.classes.unwrap();
    assert_eq!((batch.images.len(), batch.low_resolution.unwrap().len()), (4 * 16 * 16 * 3, 4 * 4 * 4 * 3));
    for (image, class) in batch.images.chunks(16 * 16 * 3).zip(classes) {
        assert!(image.iter().all(|v| *v == image[0]));
        assert_eq!(class, usize::from(image[0] == 1.0), "{}", image[0]);
    }
    assert!(batch.captions.iter().all(String::is_empty));
    let skipped = loader.skipped();
    assert!(skipped.len() == 1 && skipped[0].contains("torn.png: not a readable PNG"), "{skipped:?}");
}
