//! What each kernel needs of a multiprocessor, as `ptxas -v` says it.

use crate::nvcc::Built;
use crate::units::Arch;
use std::path::PathBuf;

/// One kernel of one image.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Resource {
    /// Kernel.
    pub kernel: String,
    /// Registers per thread.
    pub registers: u32,
    /// Shared memory per block, bytes.
    pub smem: u32,
    /// Stack per thread, bytes.
    pub stack: u32,
    /// Bytes stored and loaded because registers ran out.
    pub spill: [u32; 2],
}

/// Index into the list of images, and what `ptxas` said of each kernel in it. PTX has no entry: it has no
/// registers yet.
pub fn table(built: &[Built]) -> Result<Vec<(usize, Resource)>, String> {
    let mut table = vec![];
    for (i, unit) in built.iter().enumerate() {
        if matches!(unit.arch, Arch::Ptx(_)) {
            continue;
        }
        let rows = parse(&unit.log);
        if rows.is_empty() {
            return Err(format!("no kernel is named in what ptxas printed:\n{}", unit.log));
        }
        // ptxas does not see what the launch adds.
        table.extend(rows.into_iter().map(|row| (i, Resource { smem: row.smem + unit.smem, ..row })));
    }
    Ok(table)
}

/// Reads the output of `ptxas -v` for one image. Functions that were not inlined count towards the kernel
/// before them.
pub fn parse(log: &str) -> Vec<Resource> {
    let mut rows: Vec<Resource> = vec![];
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_string();
            rows.push(Resource { kernel, ..Resource::default() });
        }
        let Some(row) = rows.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            row.stack = row.stack.max(before(line, " bytes stack frame"));
            row.spill[0] += before(line, " bytes spill stores");
            row.spill[1] += before(line, " bytes spill loads");
        } else if line.contains(": Used ") {
            row.registers = before(line, " registers");
            row.smem = before(line, " bytes smem");
        }
    }
    rows
}

/// The number that stands before `unit` in a line; 0 if there is none.
fn before(line: &str, unit: &str) -> u32 {
    let head = line.split_once(unit).map_or("", |(head, _)| head);
    head.rsplit([' ', ',']).next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Writes the table as tab-separated text.
pub fn write(
    table: &[(usize, Resource)],
    built: &[Built],
    stems: &[&str],
    folders: &[&PathBuf],
) -> Result<(), String> {
    if built.is_empty() {
        return Ok(());
    }
    let mut text = String::from(
        "stem\ttypes\tvariant\tarch\tkernel\tregisters\tsmem\tstack\tspill_stores\tspill_loads\n",
    );
    for (i, r) in table {
        let unit = &built[*i];
        let (stem, [stores, loads]) = (stems[unit.file], r.spill);
        text += &format!("{stem}\t{}\t{}\t{}\t{}\t", unit.types, unit.variant, unit.arch, r.kernel);
        text += &format!("{}\t{}\t{}\t{stores}\t{loads}\n", r.registers, r.smem, r.stack);
    }
    for folder in folders {
        crate::write_if_changed(&folder.join("resources.tsv"), text.as_bytes())?;
    }
    Ok(())
}
