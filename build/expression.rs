//! Integer expressions of kernel files: literals, names, `+ - * / %`, shifts, comparisons, `&& ||`, `? :`.

/// What the words say, if all of them are one expression of known names.
pub fn value(words: &[&str], known: &[(String, i64)]) -> Option<i64> {
    let mut at = 0;
    choice(words, &mut at, known).filter(|_| at == words.len())
}

/// `a ? b : c`, or what binds tighter. `None` where an identifier is unknown.
fn choice(words: &[&str], at: &mut usize, known: &[(String, i64)]) -> Option<i64> {
    let value = binary(words, at, known, 0)?;
    if words.get(*at) != Some(&"?") {
        return Some(value);
    }
    *at += 1;
    let yes = choice(words, at, known)?;
    (words.get(*at) == Some(&":")).then(|| *at += 1)?;
    let no = choice(words, at, known)?;
    Some(if value != 0 { yes } else { no })
}

/// Integer expressions by precedence, as C++ has it.
fn binary(words: &[&str], at: &mut usize, known: &[(String, i64)], level: usize) -> Option<i64> {
    const LEVELS: [&[&str]; 7] = [
        &["||"],
        &["&&"],
        &["==", "!="],
        &["<=", ">=", "<", ">"],
        &["<<", ">>"],
        &["+", "-"],
        &["*", "/", "%"],
    ];
    if level == LEVELS.len() {
        return atom(words, at, known);
    }
    let mut value = binary(words, at, known, level + 1)?;
    loop {
        let (operator, size) = operator(&words[*at..]);
        if !LEVELS[level].contains(&operator.as_str()) {
            return Some(value);
        }
        *at += size;
        let right = binary(words, at, known, level + 1)?;
        value = match operator.as_str() {
            "||" => i64::from(value != 0 || right != 0),
            "&&" => i64::from(value != 0 && right != 0),
            "==" => i64::from(value == right),
            "!=" => i64::from(value != right),
            "<=" => i64::from(value <= right),
            ">=" => i64::from(value >= right),
            "<" => i64::from(value < right),
            ">" => i64::from(value > right),
            "<<" => value.checked_shl(u32::try_from(right).ok()?)?,
            ">>" => value.checked_shr(u32::try_from(right).ok()?)?,
            "+" => value.checked_add(right)?,
            "-" => value.checked_sub(right)?,
            "*" => value.checked_mul(right)?,
            "/" => value.checked_div(right)?,
            _ => value.checked_rem(right)?,
        };
    }
}

/// The operator that the next tokens, of one character each, form; and how many they are.
fn operator(words: &[&str]) -> (String, usize) {
    const TWO: [&str; 8] = ["||", "&&", "==", "!=", "<=", ">=", "<<", ">>"];
    let pair = words.iter().take(2).copied().collect::<String>();
    if TWO.contains(&pair.as_str()) { (pair, 2) } else { (words.first().unwrap_or(&"").to_string(), 1) }
}

fn atom(words: &[&str], at: &mut usize, known: &[(String, i64)]) -> Option<i64> {
    let word = *words.get(*at)?;
    *at += 1;
    match word {
        "-" => Some(-atom(words, at, known)?),
        "(" => {
            let value = choice(words, at, known)?;
            (words.get(*at) == Some(&")")).then(|| *at += 1)?;
            Some(value)
        }
        // dev.cuh's one integer.
        "WARP" => Some(32),
        _ if word.starts_with("0x") => i64::from_str_radix(&word[2..], 16).ok(),
        _ if word.starts_with(|c: char| c.is_ascii_digit()) => word.parse().ok(),
        _ => known.iter().find(|(name, _)| name == word).map(|(_, value)| *value),
    }
}
