//! Reads a kernel file: its types, variants, constants, kernels, and the struct of each kernel.
//!
//! Shared by `build.rs` and by the emulator's loader in the tests, through `#[path]`; so it uses `std` alone. It does not
//! parse C++: it knows the few forms that `kernels/*.cu` may take, and refuses what is outside them.

mod expression;

/// What one `kernels/<stem>.cu` declares.
#[derive(Debug, Clone, PartialEq)]
pub struct Unit {
    /// File name without `.cu`.
    pub stem: String,
    /// Element types `T`, or pairs `(T, Some(U))`, that it is compiled for.
    pub types: Vec<(String, Option<String>)>,
    /// Macros of each variant, as `(name, value)`; one empty list where the file lists none.
    pub variants: Vec<Vec<(String, String)>>,
    /// The variants' macros, then the file-scope `constexpr int` whose values follow from literals, macros and earlier
    /// constants alone: name, and the value in each variant.
    pub constants: Vec<(String, Vec<i64>)>,
    /// In the order of the file.
    pub kernels: Vec<Kernel>,
}

/// One `extern "C" __global__` function.
#[derive(Debug, Clone, PartialEq)]
pub struct Kernel {
    /// Name of the function.
    pub name: String,
    /// Name of its one parameter's struct: the function's name in camel case.
    pub params_struct: String,
    /// Members of that struct, in order.
    pub fields: Vec<Field>,
    /// First argument of `__launch_bounds__`, as written.
    pub bounds: Option<String>,
}

/// One member of a parameter struct.
#[derive(Debug, Clone, PartialEq)]
pub struct Field {
    /// Member name.
    pub name: String,
    /// What it holds.
    pub kind: Kind,
    /// How many of them, where it is an array.
    pub count: Option<usize>,
    /// The comment at the end of its line: a shape, usually.
    pub comment: String,
}

/// What a member of a parameter struct can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A device address.
    Pointer,
    /// `int`
    I32,
    /// `unsigned`
    U32,
    /// `float`
    F32,
    /// `long long`
    I64,
    /// `unsigned long long`
    U64,
    /// `double`
    F64,
    /// `TensorMap`
    Map,
}

impl Kind {
    /// Size and alignment in bytes.
    pub fn size(self) -> usize {
        match self {
            Kind::I32 | Kind::U32 | Kind::F32 => 4,
            Kind::Pointer | Kind::I64 | Kind::U64 | Kind::F64 => 8,
            Kind::Map => 128,
        }
    }
}

impl Field {
    /// Bytes of all of it.
    pub fn size(&self) -> usize {
        self.kind.size() * self.count.unwrap_or(1)
    }
}

impl Unit {
    /// Every (type, variant) that the file is compiled for, as the pieces of an image's header: `("f32>bf16", "D=40")`.
    pub fn images(&self) -> Vec<(String, String)> {
        let mut all = Vec::new();
        for (t, u) in &self.types {
            let types = u.as_ref().map_or(t.clone(), |u| format!("{t}>{u}"));
            for variant in &self.variants {
                let macros: Vec<String> = variant.iter().map(|(k, v)| format!("{k}={v}")).collect();
                all.push((types.clone(), macros.join(",")));
            }
        }
        all
    }

    /// Dynamic shared memory that the file asks for in one variant, in bytes: its `SMEM_BYTES`, or 0. Every kernel of the
    /// file is launched with it, so a kernel that needs none has a file of its own.
    pub fn smem(&self, variant: usize) -> u32 {
        let own = self.constants.iter().find(|(name, _)| name == SMEM_BYTES);
        own.map_or(0, |(_, values)| values[variant] as u32)
    }

    /// What the file says of its main loop in one variant: how many instructions of a kind its body holds, from the
    /// constants `LOOP_<INSTRUCTION>` (`LOOP_HMMA`). A test counts them in the machine code.
    pub fn loops(&self, variant: usize) -> Vec<(&str, i64)> {
        let own = self
            .constants
            .iter()
            .filter_map(|(name, values)| Some((name.strip_prefix(LOOP)?, values[variant])));
        own.collect()
    }

    /// C++ that does not compile unless the compiler gives each constant the value that it was read to have.
    pub fn asserts(&self, variant: usize) -> String {
        let line = |(name, values): &(String, Vec<i64>)| {
            format!("static_assert({name} == {}, \"{name} as build/scan.rs reads it\");\n", values[variant])
        };
        self.constants.iter().map(line).collect()
    }

    /// The compiler's `-D` arguments for one (type, variant).
    pub fn defines(types: &(String, Option<String>), variant: &[(String, String)]) -> Vec<String> {
        let mut all = vec![format!("-DT_{}", types.0.to_uppercase())];
        all.extend(types.1.iter().map(|u| format!("-DU_{}", u.to_uppercase())));
        all.extend(variant.iter().map(|(k, v)| format!("-D{k}={v}")));
        all
    }
}

/// The constant by which a file asks for dynamic shared memory, and the most that any device gives a block.
const SMEM_BYTES: &str = "SMEM_BYTES";
const SMEM_MOST: i64 = 227 * 1024;

/// Elements of an array in a kernel's struct: as many as Rust's own traits reach.
const MOST_ELEMENTS: usize = 32;

/// How the constants begin that count the instructions of the main loop.
const LOOP: &str = "LOOP_";

/// Whether a kernel file includes what it may: `dev.cuh`, and what kernels of its room share, `conv2d_….cuh` for `conv2d_mma`.
pub fn may_include(stem: &str, name: &str) -> bool {
    let Some(name) = name.strip_prefix('"').and_then(|n| n.strip_suffix(".cuh\"")) else { return false };
    let room = stem.split('_').next().unwrap_or_default();
    name == "dev" || name.strip_prefix(room).is_some_and(|rest| rest.starts_with('_') && !rest.contains('/'))
}

/// `group_norm_fwd` → `GroupNormFwd`.
pub fn camel_case(name: &str) -> String {
    let mut out = String::new();
    for part in name.split('_') {
        let mut letters = part.chars();
        out.extend(letters.next().map(|c| c.to_ascii_uppercase()));
        out.push_str(letters.as_str());
    }
    out
}

#[derive(Debug, Clone)]
struct Token {
    text: String,
    line: usize,
    conditional: bool,
}

struct Source {
    stem: String,
    tokens: Vec<Token>,
    comments: Vec<(usize, String)>,
}

/// Reads the text of `kernels/<stem>.cu`. An error names file and line.
pub fn scan(stem: &str, source: &str) -> Result<Unit, String> {
    let source = tokenize(stem, source)?;
    source.refuse_forbidden()?;
    let variants = source.variants()?;
    let constants = source.constants(&variants)?;
    let kernels = source.kernels(&constants)?;
    if kernels.is_empty() {
        return Err(format!(
            "kernels/{stem}.cu: no kernel (`extern \"C\" __global__ void name(const __grid_constant__ Name p)`)"
        ));
    }
    Ok(Unit { stem: stem.to_string(), types: source.types()?, variants, constants, kernels })
}

fn tokenize(stem: &str, text: &str) -> Result<Source, String> {
    let bytes: Vec<char> = text.chars().collect();
    let mut out = Source { stem: stem.to_string(), tokens: Vec::new(), comments: Vec::new() };
    let (mut i, mut line, mut depth, mut fresh) = (0, 1, 0usize, true);
    while i < bytes.len() {
        let c = bytes[i];
        let next = bytes.get(i + 1).copied().unwrap_or('\0');
        let rest = |from: usize| -> String { bytes[from..].iter().take_while(|c| **c != '\n').collect() };
        if c == '\n' {
            line += 1;
            fresh = true;
            i += 1;
        } else if c.is_whitespace() {
            i += 1;
        } else if c == '/' && next == '/' {
            let comment = rest(i);
            i += comment.chars().count();
            out.comments.push((line, comment[2..].trim().to_string()));
        } else if c == '/' && next == '*' {
            let start = line;
            i += 2;
            while i < bytes.len() && !(bytes[i] == '*' && bytes.get(i + 1) == Some(&'/')) {
                line += usize::from(bytes[i] == '\n');
                i += 1;
            }
            if i >= bytes.len() {
                return Err(format!("kernels/{stem}.cu:{start}: a comment that does not end"));
            }
            i += 2;
        } else if c == '#' && fresh {
            let directive = rest(i);
            i += directive.chars().count();
            let words: Vec<&str> = directive[1..].split_whitespace().collect();
            match words.first().copied().unwrap_or("") {
                "include" if !words.get(1).is_some_and(|name| may_include(stem, name)) => {
                    return Err(format!(
                        "kernels/{stem}.cu:{line}: want no include but \"dev.cuh\" and those of the room; got `{}`",
                        directive.trim()
                    ));
                }
                "if" | "ifdef" | "ifndef" => depth += 1,
                "endif" => depth = depth.saturating_sub(1),
                _ => {}
            }
            // A macro's text must keep to the rules too.
            if words.first() == Some(&"define") {
                let inner = tokenize(stem, &directive[1..])?;
                out.tokens.extend(inner.tokens.into_iter().map(|t| Token { line, conditional: true, ..t }));
            }
        } else if c == '"' || c == '\'' {
            let start = i;
            i += 1;
            while i < bytes.len() && bytes[i] != c && bytes[i] != '\n' {
                i += if bytes[i] == '\\' { 2 } else { 1 };
            }
            i = (i + 1).min(bytes.len());
            let text = bytes[start..i].iter().collect();
            out.tokens.push(Token { text, line, conditional: depth > 0 });
            fresh = false;
        } else {
            let word = |c: char| c.is_alphanumeric() || c == '_';
            let start = i;
            i += 1;
            while word(c) && i < bytes.len() && (word(bytes[i]) || (c.is_ascii_digit() && bytes[i] == '.')) {
                i += 1;
            }
            out.tokens.push(Token { text: bytes[start..i].iter().collect(), line, conditional: depth > 0 });
            fresh = false;
        }
    }
    Ok(out)
}

impl Source {
    fn error<R>(&self, line: usize, text: impl std::fmt::Display) -> Result<R, String> {
        Err(format!("kernels/{}.cu:{line}: {text}", self.stem))
    }

    fn text(&self, i: usize) -> &str {
        self.tokens.get(i).map_or("", |t| t.text.as_str())
    }

    fn refuse_forbidden(&self) -> Result<(), String> {
        const WORDS: [(&str, &str); 11] = [
            ("asm", "a wrapper of dev.cuh"),
            ("__asm__", "a wrapper of dev.cuh"),
            ("__shared__", "smem<Struct>()"),
            ("threadIdx", "thread_x()"),
            ("blockIdx", "block_x()"),
            ("blockDim", "block_dim_x()"),
            ("gridDim", "grid_x()"),
            ("__syncthreads", "sync_block()"),
            ("__syncwarp", "sync_warp()"),
            ("__ballot_sync", "ballot()"),
            ("__constant__", "a field of the kernel's struct"),
        ];
        for token in &self.tokens {
            if let Some((_, want)) = WORDS.iter().find(|(word, _)| *word == token.text) {
                return self.error(token.line, format!("`{}` belongs in dev.cuh; want {want}", token.text));
            }
            if token.text.starts_with("__shfl") {
                let want = "want shfl, shfl_xor or shfl_down";
                return self.error(token.line, format!("`{}` belongs in dev.cuh; {want}", token.text));
            }
        }
        Ok(())
    }

    fn listed(&self, key: &str) -> Option<(usize, Vec<&str>)> {
        let (line, text) = self.comments.iter().find(|(_, text)| text.starts_with(key))?;
        Some((*line, text[key.len()..].split_whitespace().collect()))
    }

    fn types(&self) -> Result<Vec<(String, Option<String>)>, String> {
        let Some((line, items)) = self.listed("types:") else {
            return Ok(["f32", "f16", "bf16"].map(|t| (t.to_string(), None)).to_vec());
        };
        let known = |t: &str| ["f32", "f16", "bf16"].contains(&t);
        let mut types = Vec::new();
        for item in items {
            let (t, u) = item.split_once('>').map_or((item, None), |(t, u)| (t, Some(u)));
            if !known(t) || !u.is_none_or(known) {
                let want = "want types f32, f16, bf16, or pairs such as f32>bf16";
                return self.error(line, format!("{want}; got `{item}`"));
            }
            types.push((t.to_string(), u.map(str::to_string)));
        }
        if types.is_empty() { self.error(line, "`types:` lists none") } else { Ok(types) }
    }

    fn variants(&self) -> Result<Vec<Vec<(String, String)>>, String> {
        let Some((line, items)) = self.listed("variants:") else { return Ok(vec![Vec::new()]) };
        let mut variants = Vec::new();
        for item in items {
            let mut macros = Vec::new();
            for part in item.split(',') {
                let Some((name, value)) =
                    part.split_once('=').filter(|(k, v)| !k.is_empty() && v.parse::<i64>().is_ok())
                else {
                    let want = "want variants such as D=40 or BM=128,BN=64";
                    return self.error(line, format!("{want}; got `{item}`"));
                };
                macros.push((name.to_string(), value.to_string()));
            }
            if item.len() > 16 {
                let what = format!("variant `{item}` is longer than the 16 bytes of an image's header");
                return self.error(line, what);
            }
            variants.push(macros);
        }
        if variants.is_empty() { self.error(line, "`variants:` lists none") } else { Ok(variants) }
    }

    /// What is known in every variant.
    fn constants(&self, variants: &[Vec<(String, String)>]) -> Result<Vec<(String, Vec<i64>)>, String> {
        let each: Vec<_> = variants.iter().map(|macros| self.constants_of(macros)).collect();
        let values = |name: &String| -> Option<Vec<i64>> {
            each.iter().map(|found| Some(found.iter().find(|(other, _)| other == name)?.1)).collect()
        };
        let first = each.first().map_or(&[][..], |found| found.as_slice());
        let all: Vec<_> = first.iter().filter_map(|(name, _)| Some((name.clone(), values(name)?))).collect();
        if let Some(token) = self.tokens.iter().find(|t| t.text == SMEM_BYTES) {
            let own = all.iter().find(|(name, _)| name == SMEM_BYTES);
            if !own.is_some_and(|(_, bytes)| bytes.iter().all(|n| (1..=SMEM_MOST).contains(n))) {
                let want = format!("1 to {SMEM_MOST}, from literals, constants and the variants' macros");
                let got = own.map_or("no such value".into(), |(_, bytes)| format!("{bytes:?}"));
                return self
                    .error(token.line, format!("`constexpr int {SMEM_BYTES}`: want {want}; got {got}"));
            }
        }
        for token in self.tokens.iter().filter(|t| t.text.starts_with(LOOP)) {
            if !all.iter().any(|(name, counts)| *name == token.text && counts.iter().all(|n| *n >= 0)) {
                return self.error(
                    token.line,
                    format!("`constexpr int {}`: want a count in each variant", token.text),
                );
            }
        }
        Ok(all)
    }

    fn constants_of(&self, macros: &[(String, String)]) -> Vec<(String, i64)> {
        let number = |(name, value): &(String, String)| Some((name.clone(), value.parse().ok()?));
        let mut found: Vec<(String, i64)> = macros.iter().filter_map(number).collect();
        let (mut braces, mut i) = (0usize, 0);
        while i < self.tokens.len() {
            match self.text(i) {
                "{" => braces += 1,
                "}" => braces = braces.saturating_sub(1),
                "constexpr" if braces == 0 && self.text(i + 1) == "int" && !self.tokens[i].conditional => {
                    i += 2;
                    while self.text(i + 1) == "=" {
                        let name = self.text(i).to_string();
                        let start = i + 2;
                        let mut end = start;
                        let mut nested = 0;
                        while end < self.tokens.len()
                            && !(nested == 0 && [",", ";"].contains(&self.text(end)))
                        {
                            nested += i32::from(self.text(end) == "(") - i32::from(self.text(end) == ")");
                            end += 1;
                        }
                        let words: Vec<&str> = (start..end).map(|k| self.text(k)).collect();
                        if let Some(value) = expression::value(&words, &found) {
                            found.push((name, value));
                        }
                        i = if self.text(end) == "," { end + 1 } else { end };
                    }
                }
                _ => {}
            }
            i += 1;
        }
        found
    }

    fn kernels(&self, constants: &[(String, Vec<i64>)]) -> Result<Vec<Kernel>, String> {
        let mut kernels: Vec<Kernel> = Vec::new();
        for i in 0..self.tokens.len() {
            if self.text(i) != "__global__" {
                continue;
            }
            let line = self.tokens[i].line;
            if i < 2
                || self.text(i - 1) != "\"C\""
                || self.text(i - 2) != "extern"
                || self.text(i + 1) != "void"
            {
                return self.error(line, "want `extern \"C\" __global__ void`");
            }
            let mut k = i + 2;
            let mut bounds = None;
            if self.text(k) == "__launch_bounds__" && self.text(k + 1) == "(" {
                let start = k + 2;
                let (mut nested, mut end) = (1, start);
                let mut first_end = None;
                while end < self.tokens.len() && nested > 0 {
                    nested += i32::from(self.text(end) == "(") - i32::from(self.text(end) == ")");
                    if first_end.is_none() && (nested == 0 || (nested == 1 && self.text(end) == ",")) {
                        first_end = Some(end);
                    }
                    end += 1;
                }
                bounds =
                    first_end.map(|stop| (start..stop).map(|t| self.text(t)).collect::<Vec<_>>().join(" "));
                k = end;
            }
            let name = self.text(k).to_string();
            let want = camel_case(&name);
            let got: Vec<&str> = (k + 1..k + 7).map(|t| self.text(t)).collect();
            if got[0] != "(" || got[1] != "const" || got[2] != "__grid_constant__" || got[5] != ")" {
                return self.error(
                    line,
                    format!("kernel `{name}`: want one parameter, `const __grid_constant__ {want} p`"),
                );
            }
            if got[3] != want {
                return self.error(
                    line,
                    format!("kernel `{name}`: want its struct to be `{want}`; got `{}`", got[3]),
                );
            }
            if kernels.iter().any(|kernel| kernel.name == name) {
                return self.error(line, format!("kernel `{name}` is there twice"));
            }
            let fields = self.fields(&name, &want, line, constants)?;
            kernels.push(Kernel { name, params_struct: want, fields, bounds });
        }
        Ok(kernels)
    }

    fn fields(
        &self,
        kernel: &str,
        name: &str,
        line: usize,
        constants: &[(String, Vec<i64>)],
    ) -> Result<Vec<Field>, String> {
        let is_start =
            |i: &usize| self.text(*i) == "struct" && self.text(i + 1) == name && self.text(i + 2) == "{";
        let Some(start) = (0..self.tokens.len()).find(is_start) else {
            return self.error(line, format!("kernel `{kernel}`: no `struct {name} {{ … }};` above it"));
        };
        let mut fields: Vec<Field> = Vec::new();
        let mut i = start + 3;
        while self.text(i) != "}" {
            let mut end = i;
            while end < self.tokens.len() && self.text(end) != ";" {
                end += 1;
            }
            let Some(last) = self.tokens.get(end) else {
                return self.error(line, format!("`struct {name}` does not end"));
            };
            let comment = self.comments.iter().find(|(at, _)| *at == last.line).map_or("", |(_, text)| text);
            let words: Vec<&str> = (i..end).map(|k| self.text(k)).collect();
            for (field, kind, length) in self.declaration(&words, name, last.line)? {
                if fields.iter().any(|f| f.name == field) {
                    return self.error(last.line, format!("`{name}.{field}` is there twice"));
                }
                let known = |words: &String| self.length(words, constants);
                let count = match length.as_ref().map(known) {
                    Some(None) => {
                        let want = format!("as many elements in every variant, 1 to {MOST_ELEMENTS}");
                        let got = length.unwrap_or_default();
                        return self.error(last.line, format!("`{name}.{field}`: want {want}; got `{got}`"));
                    }
                    count => count.flatten(),
                };
                fields.push(Field { name: field, kind, count, comment: comment.to_string() });
            }
            i = end + 1;
        }
        if fields.is_empty() { self.error(line, format!("`struct {name}` is empty")) } else { Ok(fields) }
    }

    /// Elements of an array: a literal, or a constant that is the same in every variant.
    fn length(&self, word: &str, constants: &[(String, Vec<i64>)]) -> Option<usize> {
        let named = || {
            let (_, values) = constants.iter().find(|(name, _)| name == word)?;
            values.iter().all(|v| *v == values[0]).then(|| usize::try_from(values[0]).ok())?
        };
        word.parse().ok().or_else(named).filter(|n| (1..=MOST_ELEMENTS).contains(n))
    }

    /// `const T* a, *b` or `int h, w[4]`: the names with their kinds, and the word in the brackets of an array.
    fn declaration(
        &self,
        words: &[&str],
        name: &str,
        line: usize,
    ) -> Result<Vec<(String, Kind, Option<String>)>, String> {
        const TYPES: &str = " const T U f16 bf16 float double int unsigned signed long short char TensorMap ";
        let at = words.iter().take_while(|w| TYPES.contains(&format!(" {w} "))).count();
        let base: Vec<&str> = words[..at].iter().copied().filter(|w| *w != "const").collect();
        let scalar = match base.join(" ").as_str() {
            "int" | "signed" | "signed int" => Some(Kind::I32),
            "unsigned" | "unsigned int" => Some(Kind::U32),
            "float" => Some(Kind::F32),
            "double" => Some(Kind::F64),
            "long long" | "long long int" => Some(Kind::I64),
            "unsigned long long" => Some(Kind::U64),
            "TensorMap" => Some(Kind::Map),
            _ => None,
        };
        let mut found = Vec::new();
        for part in words[at..].split(|w| *w == ",") {
            let pointer = part.first() == Some(&"*");
            let rest: Vec<&str> =
                part.iter().copied().filter(|w| !["*", "const", "__restrict__"].contains(w)).collect();
            let kind = if pointer && !base.is_empty() { Some(Kind::Pointer) } else { scalar };
            let is_name = |s: &str| s.starts_with(|c: char| c.is_alphabetic() || c == '_');
            match (kind, rest.as_slice()) {
                (Some(kind), [field]) if is_name(field) => found.push((field.to_string(), kind, None)),
                (Some(kind), [field, "[", length, "]"]) if is_name(field) => {
                    found.push((field.to_string(), kind, Some(length.to_string())));
                }
                _ => {
                    let got = words.join(" ");
                    return self.error(
                        line,
                        format!("`{name}`: want pointers, int, unsigned, float, long long, unsigned long long, double or TensorMap, or arrays of them; got `{got}`"),
                    );
                }
            }
        }
        Ok(found)
    }
}
