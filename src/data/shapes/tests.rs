use super::*;
use std::collections::{HashMap, HashSet};

fn world(split: Split) -> World {
    World::new(7, 64, split).unwrap()
}

/// The rules of the world, on many scenes of each split and size.
#[test]
fn scenes_keep_the_rules() {
    for (side, split) in [32, 64, 96, 256].into_iter().flat_map(|n| Split::ALL.map(|s| (n, s))) {
        for index in 0..1000 {
            let scene = World::new(3, side, split).unwrap().scene(index);
            let s = side as f64;
            for o in &scene.objects {
                let off = o.width / (s * o.size.share()) - 1.0;
                assert!(off.abs() <= 0.08, "{scene:?}");
                let [l, t, r, b] = o.bounds();
                assert!(l >= 0.999 && t >= 0.999 && r <= s - 0.999 && b <= s - 0.999, "{scene:?}");
                if split != Split::Unseen {
                    assert!(!EXCLUDED.contains(&(o.colour, o.shape)), "{scene:?}");
                }
            }
            if split == Split::Unseen {
                assert!(scene.objects.iter().any(|o| EXCLUDED.contains(&(o.colour, o.shape))));
            }
            let Some(relation) = scene.relation else {
                assert_eq!(scene.objects.len(), 1);
                continue;
            };
            let (a, b) = (scene.objects[0], scene.objects[1]);
            let [dx, dy] = [0, 1].map(|i| b.centre[i] - a.centre[i]);
            let (along, across) = match relation {
                Relation::Above => (dy, dx),
                Relation::Below => (-dy, dx),
                Relation::Left => (dx, dy),
                Relation::Right => (-dx, dy),
            };
            assert!(along >= 0.3 * s - 1e-9 && across.abs() <= 0.2 * s + 1e-9, "{scene:?}");
            let (p, q) = (a.bounds(), b.bounds());
            let gap = (0..2).map(|i| (q[i] - p[i + 2]).max(p[i] - q[i + 2])).fold(f64::MIN, f64::max);
            assert!(gap >= 1.999, "a gap of {gap}: {scene:?}");
        }
    }
}

#[test]
fn a_scene_depends_on_seed_split_and_index_alone() {
    let w = world(Split::Train);
    let late = w.scene(1 << 40);
    (0..5).for_each(|i| assert_ne!(w.scene(i), late));
    assert_eq!(w.scene(1 << 40), late);
    assert_ne!(world(Split::Test).scene(0), w.scene(0));
    assert_ne!(World::new(8, 64, Split::Train).unwrap().scene(0), w.scene(0));
    assert_eq!(w.scene(3).caption(), "a large purple ring", "the stream has changed");
    // No picture comes twice, within a split or in two.
    let mut seen = HashSet::new();
    for split in Split::ALL {
        (0..500).for_each(|i| assert!(seen.insert(world(split).scene(i).draw()), "{split} {i}"));
    }
}

/// Everything is drawn, and evenly.
#[test]
fn all_of_the_world_is_seen() {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut count = |word: String| *seen.entry(word).or_default() += 1;
    for scene in (0..8000).map(|i| world(Split::Train).scene(i)) {
        count(format!("{} objects", scene.objects.len()));
        count(scene.background.to_string());
        count(format!("says the background: {}", scene.prompt.background.is_some()));
        scene.relation.iter().for_each(|r| count(r.to_string()));
        scene.objects.iter().for_each(|o| count(format!("{} {}", o.colour, o.shape)));
        scene.objects.iter().for_each(|o| count(o.size.to_string()));
        count(format!("says the size: {}", scene.prompt.objects[0].size.is_some()));
    }
    assert_eq!(seen.len(), 2 + 3 + 2 + 4 + (CLASSES - EXCLUDED.len()) + 2 + 2);
    let (min, max) = ("red circle", 12_000 / 38);
    assert!((max * 3 / 4..max * 4 / 3).contains(&seen[min]), "{}", seen[min]);
    assert!(seen.values().all(|n| *n > 200), "{seen:?}");
    assert!((3800..4200).contains(&seen["2 objects"]));
    let one = world(Split::Train).objects(1).unwrap();
    assert!((0..100).all(|i| one.scene(i).objects.len() == 1));
}

#[test]
fn the_conditionings_agree_with_the_picture() {
    for scene in (0..300).map(|i| world(Split::Unseen).scene(i)) {
        let (picture, map, mask) = (scene.draw(), scene.semantic_map(), scene.mask());
        let pixels = picture.as_chunks::<3>().0;
        for (i, p) in pixels.iter().enumerate() {
            let colour = match (map[i] as usize).checked_sub(Background::ALL.len()) {
                None => Background::ALL[map[i] as usize].rgb(),
                Some(class) => Colour::ALL[class / Shape::ALL.len()].rgb(),
            };
            // A pixel on an edge is mixed, but nearer to what its label says than to anything across the edge.
            let off: i32 = (0..3).map(|c| (p[c] as i32 - colour[c] as i32).abs()).sum();
            let edge: i32 = scene.objects.iter().fold(0, |most, o| {
                let (a, b) = (o.colour.rgb(), scene.background.rgb());
                most.max((0..3).map(|c| (a[c] as i32 - b[c] as i32).abs()).sum())
            });
            assert!(off <= edge / 2 + 2, "{scene:?}: pixel {i}");
            let boxed = scene.boxes().iter().any(|b| {
                let [l, t, r, d] = b.bounds.map(|v| v * 64.0);
                let (x, y) = ((i % 64) as f32 + 0.5, (i / 64) as f32 + 0.5);
                (l..r).contains(&x) && (t..d).contains(&y)
            });
            assert!(boxed || map[i] < 3, "{scene:?}: a label outside of the boxes");
        }
        for b in scene.boxes() {
            assert!(map.contains(&(b.class as u8 + 3)) && b.class < CLASSES);
        }
        let share = mask.iter().map(|v| *v as usize).sum::<usize>() as f64 / 4096.0;
        assert!((0.03..=0.35).contains(&share), "a hole of {share}");
        // The twin is the mean of the picture.
        let low = scene.low_resolution(4).unwrap();
        for (i, v) in low.iter().enumerate() {
            let (x, y, c) = (i / 3 % 16, i / 48, i % 3);
            let sum: f64 = (0..16).map(|k| pixels[(y * 4 + k / 4) * 64 + x * 4 + k % 4][c] as f64).sum();
            assert!((sum / 16.0 - *v as f64).abs() <= 1.0, "{scene:?}");
        }
    }
}

#[test]
fn sizes_and_factors_are_checked() {
    for side in [0, 31, 2049, usize::MAX] {
        let e = World::new(0, side, Split::Train).unwrap_err().to_string();
        assert!(e.contains("want a size of 32 to 2048") && e.contains(&side.to_string()), "{e}");
    }
    assert!(world(Split::Train).objects(3).unwrap_err().to_string().contains("want 1 or 2 objects; got 3"));
    for factor in [0, 3, 128] {
        assert!(world(Split::Train).scene(0).low_resolution(factor).is_err());
    }
    assert!("pink".parse::<Colour>().unwrap_err().to_string().contains("purple, orange, cyan; got `pink`"));
}
