//! The shapes world: an endless, seeded data set of one or two shapes on a plain background, with captions.
//!
//! A scene is a pure function of ([`World`], index). Everything about it is known exactly, so a model that was trained on
//! it can be scored (`recognise`, `score`). It has what the conditionings of Rombach et al. 2022 need: caption, class,
//! boxes, semantic map, low-resolution twin, and a hole to paint.

use super::outline::Outline;
use super::prompt::{Prompt, Wanted};
use crate::error::{Error, Result};
use crate::rng::Small;
use std::fmt;
use std::str::FromStr;

/// An enumeration whose values are words of the captions.
macro_rules! words {
    ($($(#[$doc:meta])* $Name:ident { $($Variant:ident = $word:literal,)+ })+) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum $Name { $(#[doc = concat!("`", $word, "`.")] $Variant,)+ }

        impl $Name {
            /// All of them, in the order of their numbers.
            pub const ALL: [$Name; [$($word),+].len()] = [$($Name::$Variant),+];

            /// As in captions.
            pub fn name(self) -> &'static str {
                match self { $($Name::$Variant => $word,)+ }
            }
        }

        impl fmt::Display for $Name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $Name {
            type Err = Error;

            fn from_str(word: &str) -> Result<$Name> {
                $Name::ALL.into_iter().find(|v| v.name() == word).ok_or_else(|| {
                    let names = $Name::ALL.map(|v| v.name()).join(", ");
                    Error::invalid(format!("want one of {names}; got `{word}`"))
                })
            }
        }
    )+};
}

words! {
    /// What an object is.
    Shape {
        Circle = "circle",
        Square = "square",
        Triangle = "triangle",
        Cross = "cross",
        Ring = "ring",
        Diamond = "diamond",
    }
    /// The colour of an object.
    Colour {
        Red = "red",
        Green = "green",
        Blue = "blue",
        Yellow = "yellow",
        Purple = "purple",
        Orange = "orange",
        Cyan = "cyan",
    }
    /// The size of an object.
    Size {
        Small = "small",
        Large = "large",
    }
    /// The colour behind the objects.
    Background {
        Black = "black",
        Gray = "gray",
        White = "white",
    }
    /// Where the first object of a caption lies, seen from the second.
    Relation {
        Above = "above",
        Below = "below",
        Left = "left of",
        Right = "right of",
    }
    /// A stream of scenes. No scene is in two.
    Split {
        Train = "train",
        Test = "test",
        Unseen = "unseen",
    }
}

impl Shape {
    /// The area inside, as a share of the square of the width.
    pub fn area(self) -> f64 {
        use std::f64::consts::PI;
        match self {
            Shape::Circle => PI / 4.0,
            Shape::Square => 1.0,
            Shape::Triangle => 3f64.sqrt() / 4.0,
            Shape::Cross => 5.0 / 9.0,
            Shape::Ring => PI * 3.0 / 16.0,
            Shape::Diamond => 0.5,
        }
    }

    /// Height of the bounding box over its width.
    pub fn height(self) -> f64 {
        if self == Shape::Triangle { 3f64.sqrt() / 2.0 } else { 1.0 }
    }
}

impl Colour {
    /// Red, green, blue, 0 to 255.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Colour::Red => [220, 50, 47],
            Colour::Green => [40, 160, 70],
            Colour::Blue => [50, 90, 220],
            Colour::Yellow => [240, 200, 40],
            Colour::Purple => [150, 60, 190],
            Colour::Orange => [245, 130, 30],
            Colour::Cyan => [40, 190, 200],
        }
    }
}

impl Background {
    /// Red, green, blue, 0 to 255.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Background::Black => [20, 20, 24],
            Background::Gray => [128, 128, 128],
            Background::White => [240, 240, 240],
        }
    }
}

impl Size {
    /// Width of the bounding box over the side of the picture; each object is within 8 % of it.
    pub fn share(self) -> f64 {
        match self {
            Size::Small => 0.22,
            Size::Large => 0.36,
        }
    }
}

impl Relation {
    /// The axis along which it speaks: 0 for x, 1 for y.
    pub fn axis(self) -> usize {
        usize::from(matches!(self, Relation::Above | Relation::Below))
    }

    /// Whether the first object has the smaller coordinate.
    pub fn first_is_less(self) -> bool {
        matches!(self, Relation::Above | Relation::Left)
    }
}

/// Pairs that no scene of [`Split::Train`] or [`Split::Test`] shows, and every scene of [`Split::Unseen`] does: whether a
/// model can join what it has only seen apart.
pub const EXCLUDED: [(Colour, Shape); 4] = [
    (Colour::Purple, Shape::Triangle),
    (Colour::Orange, Shape::Ring),
    (Colour::Cyan, Shape::Square),
    (Colour::Yellow, Shape::Cross),
];

/// Classes of objects: a colour and a shape.
pub const CLASSES: usize = Colour::ALL.len() * Shape::ALL.len();

/// Labels of the semantic map: the backgrounds, then the classes.
pub const LABELS: usize = Background::ALL.len() + CLASSES;

/// The class of an object, 0 to [`CLASSES`] − 1: 6 · colour + shape.
pub fn class_of(colour: Colour, shape: Shape) -> usize {
    colour as usize * Shape::ALL.len() + shape as usize
}

/// Pixels between an object's bounding box and the border, at least.
const MARGIN: f64 = 1.0;
/// Pixels between the bounding boxes of two objects, along the axis of their relation, at least.
const GAP: f64 = 2.0;

/// An object of a scene.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Object {
    /// What it is.
    pub shape: Shape,
    /// Its colour.
    pub colour: Colour,
    /// Its size, in words.
    pub size: Size,
    /// Centre of the bounding box (x, y), in pixels.
    pub centre: [f64; 2],
    /// Width of the bounding box, in pixels.
    pub width: f64,
}

impl Object {
    /// Left, top, right, bottom of the bounding box, in pixels.
    pub fn bounds(&self) -> [f64; 4] {
        let [x, y] = self.centre;
        let (w, h) = (self.width / 2.0, self.width * self.shape.height() / 2.0);
        [x - w, y - h, x + w, y + h]
    }

    /// Its class, 0 to [`CLASSES`] − 1.
    pub fn class(&self) -> usize {
        class_of(self.colour, self.shape)
    }
}

/// A labelled box, for conditioning on a layout.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LabelledBox {
    /// Class of the object, 0 to [`CLASSES`] − 1.
    pub class: usize,
    /// Left, top, right, bottom, as shares of the side of the picture: 0 to 1.
    pub bounds: [f32; 4],
}

/// One picture of the world, and all that is known about it.
#[derive(Clone, PartialEq, Debug)]
pub struct Scene {
    /// Side of the square picture S, in pixels.
    pub side: usize,
    /// The colour behind the objects.
    pub background: Background,
    /// One or two, in the order of the caption.
    pub objects: Vec<Object>,
    /// Where the first lies, seen from the second; `None` for one object.
    pub relation: Option<Relation>,
    /// What the caption says of it.
    pub prompt: Prompt,
    /// The rectangle to paint anew: left, top, right, bottom, in whole pixels.
    pub hole: [usize; 4],
}

/// An endless stream of scenes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct World {
    seed: u64,
    side: usize,
    split: Split,
    count: Option<usize>,
}

impl World {
    /// The smallest side at which two large objects always fit, and the holes of small rings show; and the largest.
    pub const SIDES: std::ops::RangeInclusive<usize> = 32..=2048;

    /// A stream of pictures of `side` pixels (64 is usual).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a side outside [`World::SIDES`].
    pub fn new(seed: u64, side: usize, split: Split) -> Result<World> {
        let (low, high) = (World::SIDES.start(), World::SIDES.end());
        if !World::SIDES.contains(&side) {
            return Err(Error::invalid(format!("shapes: want a size of {low} to {high} pixels; got {side}")));
        }
        Ok(World { seed, side, split, count: None })
    }

    /// Only scenes of so many objects, 1 or 2: one where a single class is to stand for the whole picture.
    ///
    /// # Errors
    /// [`Error::Invalid`] for any other number.
    pub fn objects(self, count: usize) -> Result<World> {
        match count {
            1 | 2 => Ok(World { count: Some(count), ..self }),
            n => Err(Error::invalid(format!("shapes: want 1 or 2 objects; got {n}"))),
        }
    }

    /// Side of the pictures, in pixels.
    pub fn side(&self) -> usize {
        self.side
    }

    /// Scene number `index`: the same for the same world, whatever was asked before.
    pub fn scene(&self, index: u64) -> Scene {
        let stream = Small::new(self.seed).u64() ^ Small::new(!(self.split as u64)).u64();
        let mut draw = Small::new(Small::new(stream.wrapping_add(index)).u64());
        let side = self.side as f64;
        let count = self.count.unwrap_or_else(|| 1 + draw.below(2));
        let background = Background::ALL[draw.below(Background::ALL.len())];
        let relation = (count == 2).then(|| Relation::ALL[draw.below(Relation::ALL.len())]);
        let excluded = draw.below(count);
        let mut objects: Vec<Object> = (0..count)
            .map(|i| {
                let (colour, shape) = self.pair(i == excluded, &mut draw);
                let size = Size::ALL[draw.below(Size::ALL.len())];
                let width = side * size.share() * draw.range(0.92, 1.08);
                Object { shape, colour, size, centre: [0.0; 2], width }
            })
            .collect();
        match relation {
            None => place_one(&mut objects[0], side, &mut draw),
            Some(r) => place_two(&mut objects, r, side, &mut draw),
        }
        let mut says = || draw.below(2) == 0;
        let wanted = |o: &Object, size: bool| Wanted {
            size: size.then_some(o.size),
            colour: o.colour,
            shape: o.shape,
        };
        let wanted = objects.iter().map(|o| wanted(o, says())).collect();
        let prompt = Prompt { objects: wanted, relation, background: says().then_some(background) };
        let hole = hole(&objects, self.side, &mut draw);
        Scene { side: self.side, background, objects, relation, prompt, hole }
    }

    fn pair(&self, excluded: bool, draw: &mut Small) -> (Colour, Shape) {
        if self.split == Split::Unseen && excluded {
            return EXCLUDED[draw.below(EXCLUDED.len())];
        }
        loop {
            let colour = Colour::ALL[draw.below(Colour::ALL.len())];
            let shape = Shape::ALL[draw.below(Shape::ALL.len())];
            if self.split == Split::Unseen || !EXCLUDED.contains(&(colour, shape)) {
                return (colour, shape);
            }
        }
    }
}

/// Half width and half height of the bounding box.
fn halves(o: &Object) -> [f64; 2] {
    [o.width / 2.0, o.width * o.shape.height() / 2.0]
}

fn place_one(o: &mut Object, side: f64, draw: &mut Small) {
    o.centre = halves(o).map(|h| draw.range(MARGIN + h, side - MARGIN - h));
}

/// Along the relation's axis the centres are at least 0.3 of the side apart and the boxes [`GAP`]; across it the centres
/// are at most 0.2 of the side apart.
fn place_two(objects: &mut [Object], relation: Relation, side: f64, draw: &mut Small) {
    let (along, across) = (relation.axis(), 1 - relation.axis());
    let (less, more) = if relation.first_is_less() { (0, 1) } else { (1, 0) };
    let (a, b) = (halves(&objects[less]), halves(&objects[more]));
    let most = side - 2.0 * MARGIN - a[along] - b[along];
    let distance = draw.range((0.3 * side).max(a[along] + b[along] + GAP), most);
    let start = draw.range(MARGIN + a[along], side - MARGIN - b[along] - distance);
    let offset = draw.range(-0.2 * side, 0.2 * side);
    let low = (MARGIN + a[across]).max(MARGIN + b[across] - offset);
    let high = (side - MARGIN - a[across]).min(side - MARGIN - b[across] - offset);
    let line = draw.range(low, high);
    objects[less].centre[along] = start;
    objects[more].centre[along] = start + distance;
    objects[less].centre[across] = line;
    objects[more].centre[across] = line + offset;
}

/// Half of the time the box of an object, 2 to 4 pixels wider all around; else a rectangle anywhere, with sides from a
/// quarter to a half of the picture's.
fn hole(objects: &[Object], side: usize, draw: &mut Small) -> [usize; 4] {
    if draw.below(2) == 0 {
        let [left, top, right, bottom] = objects[draw.below(objects.len())].bounds();
        let wider = draw.range(2.0, 4.0);
        let end = |v: f64| ((v + wider).ceil() as usize).min(side);
        return [(left - wider).max(0.0) as usize, (top - wider).max(0.0) as usize, end(right), end(bottom)];
    }
    let [w, h] = [0; 2].map(|_| side / 4 + draw.below(side / 4 + 1));
    let (x, y) = (draw.below(side - w + 1), draw.below(side - h + 1));
    [x, y, x + w, y + h]
}

impl Scene {
    /// What the picture shows, such as `a small blue ring on a gray background`.
    pub fn caption(&self) -> String {
        self.prompt.to_string()
    }

    /// The class of the first object, 0 to [`CLASSES`] − 1.
    pub fn class(&self) -> usize {
        self.objects[0].class()
    }

    /// The objects as boxes, in the order of the caption.
    pub fn boxes(&self) -> Vec<LabelledBox> {
        let side = self.side as f64;
        let bounds = |o: &Object| o.bounds().map(|v| (v / side) as f32);
        self.objects.iter().map(|o| LabelledBox { class: o.class(), bounds: bounds(o) }).collect()
    }

    /// The picture, shape (S,S,3), 0 to 255. A pixel that an object covers in part is mixed of both colours by exact area.
    pub fn draw(&self) -> Vec<u8> {
        self.draw_at(1)
    }

    /// The same picture at a whole fraction of the size, shape (S/`factor`, S/`factor`, 3): drawn, not resized, so each
    /// pixel is the mean over the `factor` × `factor` pixels that it stands for.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the side is not a multiple of `factor`.
    pub fn low_resolution(&self, factor: usize) -> Result<Vec<u8>> {
        if factor == 0 || !self.side.is_multiple_of(factor) {
            let side = self.side;
            return Err(Error::invalid(format!(
                "shapes: want a factor that divides the size of {side}; got {factor}"
            )));
        }
        Ok(self.draw_at(factor))
    }

    fn draw_at(&self, factor: usize) -> Vec<u8> {
        let side = self.side / factor;
        let back = self.background.rgb().map(f64::from);
        let mut mixed = vec![back; side * side];
        for o in &self.objects {
            let front = o.colour.rgb().map(f64::from);
            each_covered(o, side, factor as f64, |at, part| {
                (0..3).for_each(|c| mixed[at][c] += part * (front[c] - back[c]));
            });
        }
        mixed.iter().flat_map(|p| p.map(|v| v.round() as u8)).collect()
    }

    /// The semantic map, shape (S,S): the label of what covers the greater part of each pixel. 0 to 2 are the backgrounds,
    /// 3 + class the objects; [`LABELS`] in all.
    pub fn semantic_map(&self) -> Vec<u8> {
        let mut map = vec![self.background as u8; self.side * self.side];
        for o in &self.objects {
            let label = (Background::ALL.len() + o.class()) as u8;
            each_covered(o, self.side, 1.0, |at, part| {
                if part > 0.5 {
                    map[at] = label;
                }
            });
        }
        map
    }

    /// The mask for inpainting, shape (S,S): 1 in the hole, 0 outside.
    pub fn mask(&self) -> Vec<u8> {
        let [left, top, right, bottom] = self.hole;
        let n = self.side;
        let hole = |i: usize| (left..right).contains(&(i % n)) && (top..bottom).contains(&(i / n));
        (0..n * n).map(|i| u8::from(hole(i))).collect()
    }
}

/// Calls `put` with the place and the covered part of each pixel that an object touches, in a picture of `side` pixels
/// that is `factor` times smaller than the scene.
fn each_covered(o: &Object, side: usize, factor: f64, mut put: impl FnMut(usize, f64)) {
    let outline = Outline::new(o.shape, o.centre.map(|v| v / factor), o.width / factor);
    let [left, top, right, bottom] = o.bounds().map(|v| v / factor);
    let end = |v: f64| (v.ceil() as usize).min(side);
    for y in top.max(0.0) as usize..end(bottom) {
        for x in left.max(0.0) as usize..end(right) {
            let part = outline.coverage(x, y);
            if part > 0.0 {
                put(y * side + x, part);
            }
        }
    }
}

#[cfg(test)]
mod tests;
