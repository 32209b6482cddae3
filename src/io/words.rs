//! Words of configuration files: enumerations spelled out, and names that resemble each other.

use super::config::Config;
use crate::error::Result;

/// An enumeration that a configuration file spells out.
pub(crate) trait Word: Copy + 'static {
    /// Every member with its spelling.
    const WORDS: &'static [(&'static str, Self)];
}

/// Declares a [`Word`]: members with their spelling, `name()` and `Display`.
macro_rules! words {
    ($(#[$doc:meta])* $Name:ident { $($(#[$about:meta])* $Member:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum $Name { $($(#[$about])* $Member,)+ }

        impl $Name {
            /// The word as the configuration file has it.
            pub const fn name(self) -> &'static str {
                match self { $($Name::$Member => $text,)+ }
            }
        }

        impl $crate::io::words::Word for $Name {
            const WORDS: &'static [(&'static str, Self)] = &[$(($text, $Name::$Member),)+];
        }

        impl std::fmt::Display for $Name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}
pub(crate) use words;

impl Config {
    /// A word, or nothing where the key is absent or null.
    pub(crate) fn word<W: Word>(&self, key: &str) -> Result<Option<W>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_str().and_then(|text| W::WORDS.iter().find(|(word, _)| *word == text)) {
            Some((_, member)) => Ok(Some(*member)),
            None => {
                let words: Vec<&str> = W::WORDS.iter().map(|(word, _)| *word).collect();
                Err(self.error(key, format!("one of {}", words.join(", "))))
            }
        }
    }
}

/// How many letters must be added, removed or changed to turn one word into the other.
pub(crate) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_count_edits() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!((distance("", "abc"), distance("abc", "abc")), (3, 0));
    }
}
