//! Just enough of a lexer to judge sources: words, `::`, and single signs, each with its line. Comments, strings and
//! characters are dropped, so that prose never breaks a rule.

/// A token and the line it stands on, counted from 1.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Token<'a> {
    pub text: &'a str,
    pub line: usize,
}

impl Token<'_> {
    pub fn is_word(&self) -> bool {
        self.text.starts_with(|c: char| c == '_' || c.is_alphanumeric())
    }
}

/// The tokens of Rust or C++ text.
pub fn tokens(text: &str) -> Vec<Token<'_>> {
    let bytes = text.as_bytes();
    let (mut i, mut line, mut all) = (0, 1, Vec::new());
    while i < bytes.len() {
        let start = i;
        let rest = &text[i..];
        if rest.starts_with("//") {
            i += rest.find('\n').unwrap_or(rest.len());
        } else if rest.starts_with("/*") {
            i += block_comment(rest);
        } else if let Some(length) = raw_string(rest) {
            i += length;
        } else if rest.starts_with('"') {
            i += quoted(rest, b'"');
        } else if rest.starts_with('\'') {
            i += character(rest);
        } else if rest.starts_with("::") {
            i += 2;
            all.push(Token { text: "::", line });
        } else {
            let c = rest.chars().next().unwrap_or(' ');
            let word = |c: char| c == '_' || c.is_alphanumeric();
            i += if word(c) { rest.find(|c| !word(c)).unwrap_or(rest.len()) } else { c.len_utf8() };
            if !c.is_whitespace() {
                all.push(Token { text: &text[start..i], line });
            }
        }
        line += text[start..i].matches('\n').count();
    }
    all
}

/// Length of a `/* */`, which may hold others.
fn block_comment(rest: &str) -> usize {
    let (mut depth, mut i) = (0, 0);
    while i < rest.len() {
        match &rest.as_bytes()[i..] {
            [b'/', b'*', ..] => (depth, i) = (depth + 1, i + 2),
            [b'*', b'/', ..] => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i
}

/// Length of an `r"…"`, `r#"…"#`, with or without a `b`; `None` if none begins here.
fn raw_string(rest: &str) -> Option<usize> {
    let body = rest.strip_prefix("br").or(rest.strip_prefix("r"))?;
    let hashes = body.len() - body.trim_start_matches('#').len();
    let inner = body[hashes..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    let end = inner.find(&close).map_or(inner.len(), |at| at + close.len());
    Some(rest.len() - inner.len() + end)
}

/// Length of what stands between two quotes, escapes heeded.
fn quoted(rest: &str, quote: u8) -> usize {
    let bytes = rest.as_bytes();
    let mut i = 1;
    while i < bytes.len() && bytes[i] != quote {
        i += if bytes[i] == b'\\' { 2 } else { 1 };
    }
    (i + 1).min(bytes.len())
}

/// Length of a character; of the quote alone where a lifetime begins.
fn character(rest: &str) -> usize {
    let mut chars = rest[1..].chars();
    match (chars.next(), chars.next()) {
        (Some('\\'), _) => quoted(rest, b'\''),
        (Some(c), Some('\'')) => c.len_utf8() + 2,
        _ => 1,
    }
}

/// The tokens outside `#[cfg(test)]`, and the names of modules in files of their own that stand under it.
pub fn shipped(text: &str) -> (Vec<Token<'_>>, Vec<&str>) {
    let all = tokens(text);
    let at = |i: usize| all.get(i).map_or("", |t| t.text);
    let (mut kept, mut test_modules, mut i) = (Vec::new(), Vec::new(), 0);
    while i < all.len() {
        let head = ["#", "[", "cfg", "(", "test", ")", "]"];
        if !head.iter().enumerate().all(|(k, want)| at(i + k) == *want) {
            kept.push(all[i]);
            i += 1;
            continue;
        }
        // The item ends with `;`, or with the brace that closes its first one.
        i += head.len();
        let (start, mut depth) = (i, 0);
        while i < all.len() {
            match at(i) {
                "{" | "(" | "[" => depth += 1,
                "}" | ")" | "]" => depth -= 1,
                _ => {}
            }
            i += 1;
            if depth == 0 && matches!(at(i - 1), "}" | ";") {
                break;
            }
        }
        let item = &all[start..i];
        if let [.., module, name, end] = item
            && (module.text, end.text) == ("mod", ";")
        {
            test_modules.push(name.text);
        }
    }
    (kept, test_modules)
}
