//! The machine code of the kernels, as `nvdisasm` shows it: the main loop holds the instructions that the kernel file says
//! (`LOOP_HMMA`, `LOOP_LDSM`, `LOOP_LDGSTS`; `LOOP_HGMMA`; `LOOP_FFMA`, `LOOP_LDS`) and none that have no place in it. Needs no GPU, but `nvcc` and `nvdisasm`
//! (`$NVDISASM`, beside `nvcc`, or on `PATH`); where they are missing it is skipped loudly, or fails if
//! `LDM_REQUIRE_SASS` is set, as in CI.

use ldm::kernels::{self, Arch, Image, Unit};
use rayon::prelude::*;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// One instruction of a listing.
#[derive(Debug, Clone)]
struct Instruction {
    /// Such as `LDSM.16.M88.4`.
    code: String,
    /// The label that it names.
    target: Option<String>,
}

impl Instruction {
    /// `LDSM` of `LDSM.16.M88.4`.
    fn kind(&self) -> &str {
        self.code.split('.').next().unwrap_or_default()
    }

    /// Whether it is a call of a function. The compiler also leaves loops by a "call" of a label of the same kernel.
    fn calls(&self) -> bool {
        self.kind() == "CALL" && !self.target.as_ref().is_some_and(|t| t.starts_with(".L"))
    }
}

/// A section of code, of one kernel.
#[derive(Debug, Default)]
struct Listing {
    kernel: String,
    code: Vec<Instruction>,
    /// Where each label stands: before this instruction.
    labels: HashMap<String, usize>,
}

/// Reads what `nvdisasm -c` prints.
fn parse(text: &str) -> Vec<Listing> {
    let mut all: Vec<Listing> = vec![];
    for line in text.lines().map(str::trim) {
        if let Some(kernel) = line.strip_prefix(".text.").and_then(|l| l.strip_suffix(':')) {
            all.push(Listing { kernel: kernel.into(), ..Listing::default() });
        }
        let Some(listing) = all.last_mut() else { continue };
        if let Some(label) = line.strip_suffix(':').filter(|l| l.starts_with(['.', '$'])) {
            listing.labels.insert(label.into(), listing.code.len());
        } else if let Some((_, code)) = line.strip_prefix("/*").and_then(|l| l.split_once("*/")) {
            let code = code.trim().trim_end_matches(';').trim();
            // A predicate, or the braces of two instructions that are issued together.
            let words = code.split_whitespace().skip_while(|w| w.starts_with(['@', '{', '}']));
            let Some(name) = words.clone().next() else { continue };
            let target = code.split_once("`(").and_then(|(_, t)| t.split(')').next()).map(String::from);
            listing.code.push(Instruction { code: name.into(), target });
        }
    }
    all
}

impl Listing {
    fn count(&self, range: RangeInclusive<usize>, kind: &str) -> usize {
        self.code[range].iter().filter(|i| i.kind() == kind).count()
    }

    /// From a label to the last branch back to it.
    fn loops(&self) -> Vec<RangeInclusive<usize>> {
        let mut loops: HashMap<usize, usize> = HashMap::new();
        for (at, i) in self.code.iter().enumerate().filter(|(_, i)| i.kind() == "BRA") {
            let start = i.target.as_ref().and_then(|t| self.labels.get(t)).filter(|start| **start <= at);
            start.map(|start| loops.insert(*start, at));
        }
        loops.into_iter().map(|(start, end)| start..=end).collect()
    }

    /// Of the loops that multiply and have none inside that does, the one with most products; by float units, which other
    /// loops need too, the one of which they are the largest share.
    fn main_loop(&self, product: &str) -> Option<RangeInclusive<usize>> {
        let mut loops = self.loops();
        loops.retain(|l| self.count(l.clone(), product) > 0);
        let weight = |l: &RangeInclusive<usize>| {
            let (products, all) = (self.count(l.clone(), product), l.end() - l.start() + 1);
            if product == "FFMA" { products * 10_000 / all } else { products }
        };
        let inner = |l: &&RangeInclusive<usize>| {
            !loops.iter().any(|o| o != *l && o.start() >= l.start() && o.end() <= l.end())
        };
        // A wait's polling may lie behind the end, and its way back makes a loop of all that is between: the shortest is meant.
        loops.iter().filter(inner).max_by_key(|l| (weight(l), Reverse(l.end() - l.start()))).cloned()
    }
}

/// What touches global memory, or is over, before the kernels before it are: before the first `griddep_wait`.
fn before_the_wait(listing: &Listing) -> Vec<String> {
    const TOUCHES: [&str; 12] =
        ["LD", "ST", "LDG", "STG", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG", "UBLKCP", "UTMALDG", "EXIT"];
    let Some(wait) = listing.code.iter().position(|i| i.kind() == "ACQBULK") else {
        return vec!["no ACQBULK (griddep_wait)".into()];
    };
    // Without a branch before it, what stands before it runs before it, and it is run by all.
    let early = |i: &&Instruction| TOUCHES.contains(&i.kind()) || i.target.is_some();
    listing.code[..wait].iter().filter(early).map(|i| format!("{} before ACQBULK", i.code)).collect()
}

/// What is wrong with a kernel whose file declares `want`.
fn complaints(listing: &Listing, want: &[(&str, u32)]) -> Vec<String> {
    let mut wrong = vec![];
    for i in listing.code.iter().filter(|i| ["LDL", "STL"].contains(&i.kind())) {
        wrong.push(format!("{} (local memory)", i.code));
    }
    let product = ["FFMA", "HGMMA"]
        .into_iter()
        .find(|p| want.iter().any(|(kind, n)| kind == p && *n > 0))
        .unwrap_or("HMMA");
    let Some(body) = listing.main_loop(product) else {
        let products = listing.code.iter().any(|i| [product, "HGMMA"].contains(&i.kind()));
        if products || !want.is_empty() {
            wrong.push(format!("no loop holds an {product}"));
        }
        return wrong;
    };
    if want.is_empty() {
        wrong.push("there are products on tensor cores, but the file has no LOOP_HMMA".into());
    }
    for i in &listing.code[body.clone()] {
        let (code, kind) = (i.code.as_str(), i.kind());
        // An integer division is a conversion to float, MUFU.RCP and a conversion back. A file may say how many MUFU it wants.
        let other = kind == "MUFU" && code != "MUFU.EX2" && !want.iter().any(|(kind, _)| *kind == "MUFU");
        let slow = kind.starts_with("I2F") || kind.starts_with("F2I") || other;
        if slow || i.calls() {
            wrong.push(format!("{code} in the main loop"));
        }
    }
    // An unrolled loop holds everything as many times.
    let counts: Vec<usize> = want.iter().map(|(kind, _)| listing.count(body.clone(), kind)).collect();
    let times =
        want.iter().zip(&counts).map(|((_, n), got)| got / (*n as usize).max(1)).max().unwrap_or(1).max(1);
    for ((kind, n), got) in want.iter().zip(counts) {
        if got != times * *n as usize {
            let unrolled =
                if times > 1 { format!(" times {times}, as it is unrolled") } else { String::new() };
            wrong.push(format!("{got} {kind} in the main loop; want {n}{unrolled}"));
        }
    }
    wrong
}

fn nvdisasm() -> Option<PathBuf> {
    let name = format!("nvdisasm{}", std::env::consts::EXE_SUFFIX);
    let beside = option_env!("LDM_NVCC_PATH").map(|nvcc| Path::new(nvcc).with_file_name(&name));
    let named = std::env::var_os("NVDISASM").filter(|p| !p.is_empty()).map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|p| p.join(&name));
    named.into_iter().chain(beside).chain(on_path).find(|p| p.is_file())
}

fn disassemble(program: &Path, unit: &Unit, image: &Image) -> Vec<Listing> {
    let name = format!("ldm-{}-{unit}-{}.cubin", std::process::id(), image.arch);
    let file = std::env::temp_dir().join(name.replace(['<', '>', ',', ' ', '='], "_"));
    std::fs::write(&file, image.payload()).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let out = Command::new(program).arg("-c").arg(&file).output();
    let _ = std::fs::remove_file(&file);
    let out = out.unwrap_or_else(|e| panic!("{}: {e}", program.display()));
    assert!(out.status.success(), "{unit}: {}", String::from_utf8_lossy(&out.stderr));
    parse(&String::from_utf8_lossy(&out.stdout))
}

fn skipped(why: &str) {
    use std::io::Write;
    assert!(std::env::var_os("LDM_REQUIRE_SASS").is_none(), "the machine code would not be looked at: {why}");
    let _ = writeln!(std::io::stderr(), "SKIPPED: the machine code of the kernels: {why}");
}

/// What is wrong with the machine code of all kernels.
struct Found {
    /// Images of files that declare what their main loops hold, and what else those hold.
    declared: usize,
    loops: Vec<String>,
    /// Images that wait for the kernels before theirs, and what comes before that.
    waiting: usize,
    early: Vec<String>,
}

/// Looks at each image that a test asks about, once: most of the time goes into `nvdisasm`. Says why there is none.
fn found() -> Result<&'static Found, &'static str> {
    static FOUND: OnceLock<Result<Found, &'static str>> = OnceLock::new();
    FOUND.get_or_init(look).as_ref().map_err(|why| *why)
}

fn look() -> Result<Found, &'static str> {
    if !kernels::COMPILED {
        return Err("built without nvcc");
    }
    let program = nvdisasm().ok_or("no nvdisasm")?;
    let machine_code = |i: &&Image| matches!(i.arch, Arch::Cubin(_) | Arch::CubinA(_));
    // Of the files that declare nothing one image is enough, to see that there is nothing to declare.
    let chosen = |u: &'static Unit| {
        let images = u.images.iter().filter(machine_code).enumerate();
        let images = images.map(move |(n, i)| (u, i, n == 0 || !u.loops.is_empty()));
        images.filter(|(_, image, loops)| *loops || image.arch.waits())
    };
    let images: Vec<_> = kernels::UNITS.iter().flat_map(chosen).collect();
    let wrong: Vec<[Vec<String>; 2]> = images
        .par_iter()
        .map(|&(unit, image, loops)| {
            let listings = disassemble(&program, unit, image);
            assert!(!listings.is_empty(), "{unit}: no code");
            let mut wrong = [vec![], vec![]];
            for l in &listings {
                let say = |what: String| format!("{unit} {}: {}: {what}", image.arch, l.kernel);
                if loops {
                    wrong[0].extend(complaints(l, unit.loops).into_iter().map(say));
                }
                if image.arch.waits() && !l.kernel.starts_with('$') {
                    wrong[1].extend(before_the_wait(l).into_iter().map(say));
                }
            }
            wrong
        })
        .collect();
    let declared = images.iter().filter(|(unit, ..)| !unit.loops.is_empty()).count();
    let waiting = images.iter().filter(|(_, image, _)| image.arch.waits()).count();
    let [loops, early] = [0, 1].map(|i| wrong.iter().flat_map(|w| w[i].clone()).collect());
    Ok(Found { declared, loops, waiting, early })
}

#[test]
fn main_loops_hold_what_their_files_say() {
    match found() {
        Err(why) => skipped(why),
        Ok(found) => {
            assert!(found.declared > 0, "no file declares what its main loop holds");
            assert!(found.loops.is_empty(), "\n{}\n", found.loops.join("\n"));
        }
    }
}

#[test]
fn nothing_comes_before_the_wait() {
    match found() {
        Err(why) => skipped(why),
        Ok(found) if found.waiting == 0 => skipped("no image for sm_90 or later"),
        Ok(found) => assert!(found.early.is_empty(), "\n{}\n", found.early.join("\n")),
    }
}

/// A loop over k-blocks with a branch around its copies, between two loops that are not it.
const SAMPLE: &str = "
\t.section\t.text.product,\"ax\",@progbits
        .global         product
.text.product:
        /*0000*/                   I2F.U32.RP R1, R2 ;
        /*0010*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
.L_x_0:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], [R8.64], P1 ;
        /*0030*/              @!P2 BRA P4, `(.L_x_0) ;
.L_x_1:
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R1], [R8.64], P1 ;
.L_x_2:
        /*0060*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0080*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0090*/               @P1 CALL.REL.NOINC `(.L_x_3) ;
        /*00a0*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*00b0*/                   EXIT ;
$__internal_0_$__cuda_sm20_div_s64:
        /*00c0*/                   RET.REL.NODEC R20 `(product) ;
";

fn of_sample(from: &str, to: &str, want: &[(&str, u32)]) -> String {
    assert!(SAMPLE.contains(from), "{from}");
    let all = parse(&SAMPLE.replace(from, to));
    assert_eq!(all.iter().map(|l| l.kernel.as_str()).collect::<Vec<_>>(), ["product"]);
    complaints(&all[0], want).join("; ")
}

#[test]
fn an_access_before_the_wait_is_found() {
    let of = |code: &[&str]| {
        let lines: String =
            code.iter().map(|c| format!("        /*0000*/                   {c} ;\n")).collect();
        before_the_wait(&parse(&format!(".text.k:\n{lines}"))[0]).join("; ")
    };
    let (wait, load, exit) = ("ACQBULK", "LDG.E.128 R8, desc[UR4][R8.64]", "EXIT");
    let constant = "ULDC.64 UR4, c[0x0][0x208]";
    assert_eq!(of(&[constant, "S2R R4, SR_TID.X", wait, load, exit]), "");
    assert_eq!(of(&[load, exit]), "no ACQBULK (griddep_wait)");
    assert_eq!(of(&[load, wait, exit]), "LDG.E.128 before ACQBULK");
    assert_eq!(of(&["LDGSTS.E.BYPASS.128 [R1], [R8.64]", wait, exit]), "LDGSTS.E.BYPASS.128 before ACQBULK");
    assert_eq!(of(&["@P0 EXIT", wait, load, exit]), "EXIT before ACQBULK");
    assert_eq!(of(&["@P0 BRA `(.L_x_0)", wait, load, exit]), "BRA before ACQBULK");
}

#[test]
fn a_wrong_main_loop_is_found() {
    let want = [("HMMA", 2), ("LDSM", 1), ("LDGSTS", 1)];
    assert_eq!(of_sample("LDSM", "LDSM", &want), "");
    let ldsm = "        /*0060*/                   LDSM.16.M88.4 R4, [R2] ;\n";
    let hmma = "        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;\n";
    let more = |line: &str| format!("{ldsm}{line}");
    for (from, to, says) in [
        (ldsm, String::new(), "0 LDSM in the main loop; want 1"),
        (ldsm, more(ldsm), "want 2 times 2, as it is unrolled; 1 LDGSTS in the main loop; want 1 times 2"),
        (hmma, String::new(), "1 HMMA in the main loop; want 2"),
        (ldsm, more("/*0068*/ @!P0 I2F.S8 R1, R2 ;\n"), "I2F.S8 in the main loop"),
        (ldsm, more("/*0068*/ I2FP.F32.S32 R1, R2 ;\n"), "I2FP.F32.S32 in the main loop"),
        (ldsm, more("/*0068*/ F2I.FTZ.U32.TRUNC.NTZ R1, R2 ;\n"), "F2I.FTZ.U32.TRUNC.NTZ in the main loop"),
        (ldsm, more("/*0068*/ MUFU.RCP R1, R2 ;\n"), "MUFU.RCP in the main loop"),
        (ldsm, more("/*0068*/ MUFU.EX2 R1, R2 ;\n"), ""),
        (ldsm, more("/*0068*/ CALL.REL.NOINC `($f) ;\n"), "CALL.REL.NOINC in the main loop"),
        ("EXIT", "STL [R1], R2".into(), "STL (local memory)"),
        ("EXIT", "LDL.64 R2, [R1]".into(), "LDL.64 (local memory)"),
        ("BRA `(.L_x_1)", "BRA `(.L_x_3)".into(), "no loop holds an HMMA"),
    ] {
        let got = of_sample(from, &to, &want);
        assert!(got.contains(says) && says.is_empty() == got.is_empty(), "want `{says}`; got `{got}`");
    }
    let reciprocal = more("/*0068*/ MUFU.RCP R1, R2 ;\n");
    assert_eq!(of_sample(ldsm, &reciprocal, &[("MUFU", 1), ("HMMA", 2)]), "");
    assert!(
        of_sample(ldsm, &reciprocal, &[("MUFU", 2), ("HMMA", 2)]).contains("1 MUFU in the main loop; want 2")
    );
    assert!(of_sample("LDSM", "LDSM", &[]).contains("the file has no LOOP_HMMA"));
    // By warpgroups.
    let group = |from: &str, to: &str| of_sample(from, to, &[("HMMA", 0), ("HGMMA", 2), ("LDGSTS", 1)]);
    let hgmma = "        /*0070*/                   HGMMA.64x160x16.F32.BF16 R24, gdesc[UR20], R24 ;\n";
    assert_eq!(group("HMMA.16816", "HGMMA.64x160x16"), "");
    assert_eq!(group(hmma, hgmma), "1 HMMA in the main loop; want 0; 1 HGMMA in the main loop; want 2");
    assert_eq!(group(hmma, hmma), "no loop holds an HGMMA");
    assert!(of_sample("HMMA.16816", "HGMMA.64x160x16", &[]).contains("no loop holds an HMMA"));
    // By float units: the shorter loop, of which they are more, is the main one.
    let floats = "        /*0000*/ FFMA R1, R2, R3, R1 ;\n".repeat(4);
    let slow = "        /*0010*/ MUFU.RCP R1, R1 ;\n".repeat(2);
    let other = format!("{floats}{slow}").repeat(2);
    let main = format!(".L_x_8:\n{floats}        /*0020*/ @P0 BRA `(.L_x_8) ;\n");
    let both = format!(".L_x_9:\n{other}        /*0030*/ @P0 BRA `(.L_x_9) ;\n{main}");
    let exit = "        /*00b0*/                   EXIT ;\n";
    assert_eq!(of_sample(exit, &format!("{both}{exit}"), &[("FFMA", 4), ("LDS", 0)]), "");
    // Polling that lies behind the end and goes back into the loop is no part of what lies between.
    let poll =
        "        /*00b0*/ I2F.S8 R1, R2 ;\n        /*00b8*/ EXIT ;\n        /*00c0*/ BRA `(.L_x_2) ;\n";
    assert_eq!(of_sample(exit, poll, &want), "");
    let got = of_sample(exit, &format!("{both}{exit}"), &[("FFMA", 4), ("LDS", 1)]);
    assert_eq!(got, "0 LDS in the main loop; want 1");
    // Twice everything is the same loop, unrolled.
    let body = SAMPLE.split_once(".L_x_2:\n").unwrap().1.split_once("        /*0090*/").unwrap().0;
    let copies = "        /*0050*/                   LDGSTS.E.BYPASS.128 [R1], [R8.64], P1 ;\n";
    assert_eq!(of_sample(body, &format!("{body}{copies}{body}"), &want), "");
}
