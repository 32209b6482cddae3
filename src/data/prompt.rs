//! Captions of the shapes world, to and from text.

use super::shapes::{Background, Colour, EXCLUDED, Relation, Shape, Size};
use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// An object as a caption names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// `None` where the caption leaves it open.
    pub size: Option<Size>,
    /// Its colour.
    pub colour: Colour,
    /// What it is.
    pub shape: Shape,
}

/// What a caption says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prompt {
    /// One or two.
    pub objects: Vec<Wanted>,
    /// Where the first lies, seen from the second; `None` for one object.
    pub relation: Option<Relation>,
    /// `None` where the caption leaves it open.
    pub background: Option<Background>,
}

impl Prompt {
    /// Whether it names a pair of colour and shape that training never shows.
    pub fn is_unseen(&self) -> bool {
        self.objects.iter().any(|o| EXCLUDED.contains(&(o.colour, o.shape)))
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = self.size.map_or(self.colour.name(), Size::name);
        let article = if first.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
        match self.size {
            Some(size) => write!(f, "{article} {size} {} {}", self.colour, self.shape),
            None => write!(f, "{article} {} {}", self.colour, self.shape),
        }
    }
}

impl fmt::Display for Prompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, object) in self.objects.iter().enumerate() {
            match self.relation.filter(|_| i > 0) {
                Some(relation) => write!(f, " {relation} {object}")?,
                None => write!(f, "{object}")?,
            }
        }
        self.background.map_or(Ok(()), |b| write!(f, " on a {b} background"))
    }
}

impl FromStr for Prompt {
    type Err = Error;

    /// Reads a caption; nothing else is understood.
    fn from_str(text: &str) -> Result<Prompt> {
        let all: Vec<&str> = text.split_ascii_whitespace().collect();
        let mut words = &all[..];
        parse(&mut words).filter(|_| words.is_empty()).ok_or_else(|| {
            let at = all.len() - words.len();
            let place = words.first().map_or("at its end".into(), |w| format!("at word {}, `{w}`", at + 1));
            Error::invalid(format!(
                "prompt: want a caption of the shapes world, such as `a red circle above a small green square on a gray \
                 background`; got `{text}`, not understood {place}"
            ))
        })
    }
}

fn parse(words: &mut &[&str]) -> Option<Prompt> {
    let mut objects = vec![object(words)?];
    let relation = Relation::ALL.into_iter().find(|r| take(words, &r.name().split(' ').collect::<Vec<_>>()));
    if relation.is_some() {
        objects.push(object(words)?);
    }
    let background = match take(words, &["on", "a"]) {
        true => {
            let background = word(words)?;
            take(words, &["background"]).then_some(())?;
            Some(background)
        }
        false => None,
    };
    Some(Prompt { objects, relation, background })
}

fn object(words: &mut &[&str]) -> Option<Wanted> {
    (take(words, &["a"]) || take(words, &["an"])).then_some(())?;
    let size = word(words);
    Some(Wanted { size, colour: word(words)?, shape: word(words)? })
}

/// Takes these words off the front, if they stand there.
fn take(words: &mut &[&str], want: &[&str]) -> bool {
    let found = words.starts_with(want);
    if found {
        *words = &words[want.len()..];
    }
    found
}

/// Takes a word of an enumeration off the front, if one stands there.
fn word<T: FromStr>(words: &mut &[&str]) -> Option<T> {
    let value = words.first()?.parse().ok()?;
    *words = &words[1..];
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::super::shapes::{Split, World};
    use super::*;

    #[test]
    fn captions_read_as_they_should_and_come_back() {
        for text in [
            "a large red circle",
            "an orange diamond",
            "a small orange diamond",
            "a small blue ring on a gray background",
            "a red circle above a green square",
            "a small cyan cross left of a large yellow diamond on a black background",
            "a red circle right of an orange circle on a white background",
        ] {
            assert_eq!(text.parse::<Prompt>().unwrap().to_string(), text);
        }
        for split in Split::ALL {
            for scene in (0..500).map(|i| World::new(1, 64, split).unwrap().scene(i)) {
                let prompt: Prompt = scene.caption().parse().unwrap();
                assert_eq!(prompt, scene.prompt);
                assert_eq!(prompt.is_unseen(), split == Split::Unseen, "{prompt}");
                assert_eq!(prompt.to_string().to_lowercase(), prompt.to_string());
            }
        }
    }

    #[test]
    fn other_texts_are_refused_at_the_word() {
        for (text, say) in [
            ("", "at its end"),
            ("a red", "at its end"),
            ("red circle", "at word 1, `red`"),
            ("a pink circle", "at word 2, `pink`"),
            ("a red circle beside a green square", "at word 4, `beside`"),
            ("a red circle above", "at its end"),
            ("a red circle left a green square", "at word 4, `left`"),
            ("a red circle on a red background", "at word 6, `red`"),
            ("a red circle on a gray background, oil on canvas", "at word 7, `background,`"),
        ] {
            let e = text.parse::<Prompt>().unwrap_err().to_string();
            assert!(e.contains(say) && e.contains(&format!("`{text}`")), "{text}: {e}");
        }
    }
}
