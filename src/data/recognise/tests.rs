use super::super::shapes::{Scene, Split, World};
use super::*;
use crate::rng::Small;

/// A Gaussian blur of the picture with sigma in pixels (edges repeated), then noise of that deviation in 0 to 255.
fn worsen(side: usize, rgb: &[u8], sigma: f64, noise: f64, draw: &mut Small) -> Vec<u8> {
    let taps: Vec<f64> =
        (-4..=4).map(|i| (-((i * i) as f64) / (2.0 * sigma * sigma).max(1e-9)).exp()).collect();
    let sum: f64 = taps.iter().sum();
    let mut x: Vec<f64> = rgb.iter().map(|v| *v as f64).collect();
    for stride in [3, 3 * side] {
        let at = |i: usize, k: usize| {
            let from = i / stride % side;
            let to = (from + k).saturating_sub(4).min(side - 1);
            x[i - from * stride + to * stride]
        };
        x = (0..x.len()).map(|i| (0..9).map(|k| taps[k] * at(i, k)).sum::<f64>() / sum).collect();
    }
    x.iter().map(|v| (v + noise * draw.normal()).round().clamp(0.0, 255.0) as u8).collect()
}

/// Whether everything was read right; otherwise what was not.
fn mistake(scene: &Scene, seen: &Seen) -> Option<&'static str> {
    if seen.background != Some(scene.background) {
        return Some("background");
    }
    if seen.objects.len() != scene.objects.len() {
        return Some("number");
    }
    for o in &scene.objects {
        let off = |f: &Found| (f.centre[0] - o.centre[0]).hypot(f.centre[1] - o.centre[1]);
        let found = seen.objects.iter().min_by(|a, b| off(a).total_cmp(&off(b))).unwrap();
        for (what, right) in [
            ("place", off(found) < 1.0),
            ("width", (found.width / o.width - 1.0).abs() < 0.1),
            ("shape", found.shape == Some(o.shape)),
            ("colour", found.colour == Some(o.colour)),
            ("size", found.size == Some(o.size)),
        ] {
            if !right {
                return Some(what);
            }
        }
    }
    None
}

/// Mistakes in `n` scenes of each split.
fn mistakes(n: u64, side: usize, sigma: f64, noise: f64) -> Vec<String> {
    let mut draw = Small::new(5);
    let mut all = vec![];
    for split in Split::ALL {
        for scene in (0..n).map(|i| World::new(11, side, split).unwrap().scene(i)) {
            let picture = worsen(side, &scene.draw(), sigma, noise, &mut draw);
            let seen = recognise(side, &picture).unwrap();
            all.extend(mistake(&scene, &seen).map(|what| format!("{what}: {scene:?}: {seen:?}")));
        }
    }
    all
}

#[test]
fn drawn_scenes_are_read_without_a_mistake() {
    for (side, n) in [(32, 300), (64, 2000), (128, 200)] {
        let bad = mistakes(n, side, 0.0, 0.0);
        assert!(bad.is_empty(), "{side}: {} mistakes: {:#?}", bad.len(), &bad[..bad.len().min(5)]);
    }
}

/// The share of the pictures that are read without any mistake, of 3000 each. What a generated picture has of blur and
/// noise is about the third row; the last two are beyond.
#[test]
fn blurred_and_noisy_scenes_are_read_nearly_without() {
    for (sigma, noise, most) in
        [(0.7, 0.0, 0), (0.0, 10.0, 0), (0.7, 10.0, 0), (1.0, 10.0, 15), (1.0, 15.0, 60)]
    {
        let bad = mistakes(1000, 64, sigma, noise);
        eprintln!("blur {sigma}, noise {noise}: {} mistakes of 3000", bad.len());
        let some = &bad[..bad.len().min(3)];
        assert!(bad.len() <= most, "blur {sigma}, noise {noise}: {} mistakes: {some:#?}", bad.len());
    }
}

/// A picture of 64x64 with what `inside` says of the middles of its pixels in one colour, on gray.
fn drawn(rgb: [u8; 3], inside: impl Fn(f64, f64) -> bool) -> Seen {
    let pixel =
        |i: usize| if inside((i % 64) as f64 - 31.5, (i / 64) as f64 - 31.5) { rgb } else { [128; 3] };
    recognise(64, &(0..4096).flat_map(pixel).collect::<Vec<u8>>()).unwrap()
}

#[test]
fn what_the_world_does_not_have_is_not_taken_for_what_it_has() {
    let red = Colour::Red.rgb();
    let one = |seen: Seen| {
        assert_eq!(seen.objects.len(), 1, "{seen:?}");
        seen.objects[0]
    };
    assert_eq!(one(drawn(red, |x, y| x.hypot(y) < 10.0)).shape, Some(Shape::Circle));
    assert_eq!(one(drawn(red, |x, y| x.hypot(2.0 * y) < 16.0)).shape, None, "an ellipse");
    assert_eq!(one(drawn(red, |x, y| x.abs() < 20.0 && y.abs() < 3.0)).shape, None, "a bar");
    assert_eq!(one(drawn(red, |x, y| x.hypot(y) < 14.0 && x > 0.0)).shape, None, "half a disc");
    assert_eq!(one(drawn([255, 0, 255], |x, y| x.hypot(y) < 10.0)).colour, None, "magenta");
    assert_eq!(one(drawn(red, |x, y| x.hypot(y) < 17.0)).size, None, "too large");
    assert_eq!(one(drawn(red, |x, y| x.hypot(y) < 4.5)).size, None, "too small");
    assert_eq!(drawn(red, |x, y| x.hypot(y) < 2.0).objects, [], "a speck");
    assert_eq!(drawn(red, |x, y| (x.abs() - 15.0).hypot(y) < 8.0).objects.len(), 2);
    assert_eq!(drawn(red, |x, y| (x.abs() - 15.0).hypot(y.abs() - 15.0) < 7.0).objects.len(), 4);
    let pink = recognise(64, &[255, 150, 200].repeat(4096)).unwrap();
    assert_eq!(pink, Seen { background: None, objects: vec![] });
}

#[test]
fn sizes_are_checked() {
    for (side, len) in [(64, 100), (8, 192), (0, 0), (usize::MAX, 12)] {
        let e = recognise(side, &vec![0; len]).unwrap_err().to_string();
        assert!(e.contains("want a square picture") && e.contains(&format!("{len} bytes")), "{e}");
    }
}
