//! Scores of pictures that were asked for with captions of the shapes world: what is there, against what was asked.

use super::prompt::{Prompt, Wanted};
use super::recognise::{Found, Seen};
use super::shapes::Relation;

/// What is judged, in the order of [`Verdict`]:
///
/// * `number`: as many objects as were asked for;
/// * `colour`, `shape`: each object asked for has one of its own that agrees;
/// * `binding`: colour and shape, on the same object;
/// * `size`, `relation`, `background`: as asked, where the caption says;
/// * `all`: everything that was asked for, and nothing more.
pub const CRITERIA: [&str; 8] =
    ["number", "colour", "shape", "binding", "size", "relation", "background", "all"];

/// For each of [`CRITERIA`], whether the picture is right; `None` for what the caption does not ask.
pub type Verdict = [Option<bool>; CRITERIA.len()];

/// Judges a picture. Where it has more objects than one, they are matched with the caption's in the way that makes most right.
pub fn judge(prompt: &Prompt, seen: &Seen) -> Verdict {
    let number = seen.objects.len() == prompt.objects.len();
    let background = prompt.background.map(|b| seen.background == Some(b));
    let matched = matches(prompt.objects.len(), seen)
        .map(|found| judge_objects(prompt, &found))
        .max_by_key(|verdict| (verdict[2], verdict.iter().filter(|v| **v == Some(true)).count()))
        .unwrap_or([None; 5]);
    let [colour, shape, binding, size, relation] = matched;
    let asked = [Some(number), colour, shape, binding, size, relation, background];
    let all = asked.iter().all(|v| *v != Some(false));
    [asked[0], asked[1], asked[2], asked[3], asked[4], asked[5], asked[6], Some(all)]
}

/// Colour, shape, binding, size and relation of objects in the order of the caption.
fn judge_objects(prompt: &Prompt, found: &[Option<&Found>]) -> [Option<bool>; 5] {
    let every = |right: &dyn Fn(&Wanted, &Found) -> bool| {
        prompt.objects.iter().zip(found).all(|(w, f)| f.is_some_and(|f| right(w, f)))
    };
    let sized = prompt.objects.iter().any(|w| w.size.is_some());
    [
        Some(every(&|w, f| f.colour == Some(w.colour))),
        Some(every(&|w, f| f.shape == Some(w.shape))),
        Some(every(&|w, f| f.colour == Some(w.colour) && f.shape == Some(w.shape))),
        sized.then(|| every(&|w, f| w.size.is_none() || f.size == w.size)),
        prompt.relation.map(|r| match found {
            [Some(a), Some(b)] => holds(r, a, b),
            _ => false,
        }),
    ]
}

/// All ways to give each of `wanted` objects (1 or 2) one that was seen; `None` where there are too few.
fn matches(wanted: usize, seen: &Seen) -> impl Iterator<Item = Vec<Option<&Found>>> {
    let count = seen.objects.len().max(wanted);
    let get = |i: usize| seen.objects.get(i);
    (0..count).flat_map(move |i| {
        let second = if wanted == 2 { 0..count } else { i + 1..i + 2 };
        second.filter(move |j| *j != i).map(move |j| [get(i), get(j)][..wanted.min(2)].to_vec())
    })
}

/// Whether `a` lies in this relation to `b`: along its axis on the right side, and farther apart than across it.
fn holds(relation: Relation, a: &Found, b: &Found) -> bool {
    let axis = relation.axis();
    let [along, across] = [axis, 1 - axis].map(|i| b.centre[i] - a.centre[i]);
    (along > 0.0) == relation.first_is_less() && along.abs() > across.abs()
}

/// Verdicts of many pictures, counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// Pictures.
    pub pictures: usize,
    /// For each of [`CRITERIA`]: how many are right, and of how many it was asked.
    pub counts: [(usize, usize); CRITERIA.len()],
}

impl Tally {
    /// Adds a picture.
    pub fn add(&mut self, verdict: &Verdict) {
        self.pictures += 1;
        for ((right, asked), v) in self.counts.iter_mut().zip(verdict) {
            *right += usize::from(*v == Some(true));
            *asked += usize::from(v.is_some());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::recognise::recognise;
    use super::super::shapes::{Split, World};
    use super::*;

    const SIDE: usize = 64;

    /// The verdict on a drawn scene for a prompt that is not its own.
    fn verdict(picture: &str, prompt: &str) -> Vec<(&'static str, bool)> {
        let wanted: Prompt = picture.parse().unwrap();
        let world = World::new(2, SIDE, Split::Train).unwrap().objects(wanted.objects.len()).unwrap();
        let open = |p: &Prompt| Prompt {
            objects: p.objects.iter().map(|o| Wanted { size: None, ..*o }).collect(),
            background: None,
            ..p.clone()
        };
        // The first scene that shows it.
        let shown = (0..).map(|i| world.scene(i)).find(|s| {
            let sizes =
                wanted.objects.iter().zip(&s.objects).all(|(w, o)| w.size.is_none_or(|v| v == o.size));
            open(&s.prompt) == open(&wanted) && sizes && wanted.background.is_none_or(|b| b == s.background)
        });
        let seen = recognise(SIDE, &shown.unwrap().draw()).unwrap();
        let verdict = judge(&prompt.parse().unwrap(), &seen);
        CRITERIA.into_iter().zip(verdict).filter_map(|(name, v)| Some((name, v?))).collect()
    }

    fn wrong(picture: &str, prompt: &str) -> Vec<&'static str> {
        verdict(picture, prompt).into_iter().filter(|v| !v.1).map(|v| v.0).collect()
    }

    #[test]
    fn only_what_is_asked_is_judged() {
        let names =
            |prompt| verdict("a small red circle", prompt).into_iter().map(|v| v.0).collect::<Vec<_>>();
        assert_eq!(names("a red circle"), ["number", "colour", "shape", "binding", "all"]);
        assert_eq!(names("a large red circle"), ["number", "colour", "shape", "binding", "size", "all"]);
        let two = "a red circle above a blue ring on a gray background";
        assert_eq!(names(two), ["number", "colour", "shape", "binding", "relation", "background", "all"]);
    }

    #[test]
    fn each_mistake_is_found_where_it_is() {
        let none: [&str; 0] = [];
        let one = "a small red circle on a gray background";
        assert_eq!(wrong(one, one), none);
        assert_eq!(wrong(one, "a large red circle"), ["size", "all"]);
        assert_eq!(wrong(one, "a red circle on a white background"), ["background", "all"]);
        assert_eq!(wrong(one, "a red square"), ["shape", "binding", "all"]);
        assert_eq!(wrong(one, "a blue circle"), ["colour", "binding", "all"]);
        let two = "a red circle above a green square";
        assert_eq!(wrong(two, two), none);
        assert_eq!(wrong(two, "a green square below a red circle"), none);
        assert_eq!(wrong(two, "a red circle below a green square"), ["relation", "all"]);
        assert_eq!(wrong(two, "a red circle left of a green square"), ["relation", "all"]);
        // The parts are there, joined wrongly.
        assert_eq!(wrong(two, "a green circle below a red square"), ["shape", "binding", "all"]);
        assert_eq!(wrong(two, "a red circle"), ["number", "all"]);
        assert_eq!(
            wrong(one, "a red circle above a red circle"),
            ["number", "colour", "shape", "binding", "relation", "all"]
        );
    }

    #[test]
    fn an_empty_picture_has_nothing_right_but_its_background() {
        let seen = recognise(SIDE, &[128; SIDE * SIDE * 3]).unwrap();
        let prompt: Prompt = "a small red circle above a blue ring on a gray background".parse().unwrap();
        let no = Some(false);
        assert_eq!(judge(&prompt, &seen), [no, no, no, no, no, no, Some(true), no]);
    }

    #[test]
    fn every_scene_of_the_world_has_all_right() {
        let mut tally = Tally::default();
        for scene in (0..500).map(|i| World::new(9, SIDE, Split::Unseen).unwrap().scene(i)) {
            tally.add(&judge(&scene.prompt, &recognise(SIDE, &scene.draw()).unwrap()));
        }
        assert!(tally.counts.iter().all(|(right, asked)| right == asked && *asked > 200), "{tally:?}");
        assert_eq!(tally.pictures, 500);
    }
}
