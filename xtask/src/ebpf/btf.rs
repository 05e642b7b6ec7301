//! Makes the BTF of an object the same in each build. LLVM's BPF back end keeps the types that it only declares in a map that is
//! ordered by their addresses in its own memory, which differ from run to run; their names are written in that order too.
//!
//! Pure: bytes in, bytes out. The layout is that of Documentation/bpf/btf.rst of the kernel; all declarations are equally long, so
//! that nothing moves but they themselves. Used by [`super`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use anyhow::{Context, Result, bail};

/// Bytes of a type without what follows it for its kind: name, info, and size or type.
const TYPE: usize = 12;

const ARRAY: u32 = 3;
const FWD: u32 = 7;

/// A type: its place, and where it names other types.
struct Type {
    at: usize,
    kind: u32,
    names: Vec<usize>,
}

/// Puts the declarations into the order of their names, those of one name into that of who names them first.
pub(super) fn settle(btf: &mut [u8]) -> Result<()> {
    let types = types(btf)?;
    let mut first = HashMap::new();
    for at in types.iter().flat_map(|of| &of.names) {
        first.entry(word(btf, *at)?).or_insert(*at);
    }
    let declared: Vec<(u32, usize)> =
        (1..).zip(&types).filter(|(_, of)| of.kind == FWD).map(|(id, of)| (id, of.at)).collect();
    settle_names(btf, &types, &declared)?;
    let mut sorted = Vec::new();
    for (id, at) in &declared {
        let bytes = btf.get(*at..at + TYPE).context("a type is cut off")?.to_vec();
        sorted.push((name(btf, word(btf, *at)?)?, bytes, first.get(id).copied(), *id));
    }
    sorted.sort();
    let mut renamed = HashMap::new();
    for ((id, at), (_, bytes, _, was)) in declared.iter().zip(&sorted) {
        renamed.insert(*was, *id);
        btf.get_mut(*at..at + TYPE).context("a type is cut off")?.copy_from_slice(bytes);
    }
    for at in types.iter().flat_map(|of| &of.names) {
        if let Some(id) = renamed.get(&word(btf, *at)?) {
            btf.get_mut(*at..at + 4).context("a type is cut off")?.copy_from_slice(&id.to_le_bytes());
        }
    }
    Ok(())
}

/// Puts the names that declarations alone have, which lie one after the other in the order in which they were written, into the order
/// of the alphabet.
fn settle_names(btf: &mut [u8], types: &[Type], declared: &[(u32, usize)]) -> Result<()> {
    let mut others = HashSet::new();
    for of in types.iter().filter(|of| of.kind != FWD) {
        others.insert(word(btf, of.at)?);
    }
    let mut own = BTreeMap::new();
    for (_, at) in declared {
        let offset = word(btf, *at)?;
        if !others.contains(&offset) {
            own.insert(offset, name(btf, offset)?);
        }
    }
    let Some(start) = own.keys().next().copied() else { return Ok(()) };
    let after = |offset: u32, name: &[u8]| anyhow::Ok(offset + u32::try_from(name.len())? + 1);
    let mut end = start;
    for (offset, name) in &own {
        if *offset != end {
            bail!("names of declarations do not lie one after the other");
        }
        end = after(*offset, name)?;
    }
    let mut sorted: Vec<(&Vec<u8>, u32)> = own.iter().map(|(offset, name)| (name, *offset)).collect();
    sorted.sort();
    let (names, mut next, mut moved) = (parts(btf)?.1, start, HashMap::new());
    for (name, was) in sorted {
        let place = names + next as usize;
        btf.get_mut(place..place + name.len() + 1)
            .context("a name is cut off")?
            .copy_from_slice(&[name, &[0][..]].concat());
        moved.insert(was, next);
        next = after(next, name)?;
    }
    for (_, at) in declared {
        if let Some(offset) = moved.get(&word(btf, *at)?) {
            btf.get_mut(*at..at + 4).context("a type is cut off")?.copy_from_slice(&offset.to_le_bytes());
        }
    }
    Ok(())
}

/// Where types and names are.
fn parts(btf: &[u8]) -> Result<(Range<usize>, usize)> {
    if btf.get(..2) != Some(&[0x9f, 0xeb]) {
        bail!("this is no BTF of a little-endian machine");
    }
    let [header, types, length, names] = [4, 8, 12, 16].map(|at| word(btf, at).map(|word| word as usize));
    let (header, types, length) = (header?, types?, length?);
    Ok((header + types..header + types + length, header + names?))
}

fn types(btf: &[u8]) -> Result<Vec<Type>> {
    let (place, _) = parts(btf)?;
    let (mut types, mut at) = (Vec::new(), place.start);
    while at < place.end {
        let info = word(btf, at + 4)?;
        let (kind, count) = (info >> 24 & 31, (info & 0xffff) as usize);
        // How long each of what follows is, how many there are, and where each names a type.
        let (length, count, within): (usize, usize, &[usize]) = match kind {
            // Integers, variables and tags of declarations have one word more.
            1 | 14 | 17 => (4, 1, &[]),
            ARRAY => (TYPE, 1, &[0, 4]),
            // Members of structures and unions.
            4 | 5 => (12, count, &[4]),
            6 => (8, count, &[]),
            // Parameters.
            13 => (8, count, &[4]),
            // Variables of a section.
            15 => (12, count, &[0]),
            19 => (12, count, &[]),
            2 | FWD | 8..=12 | 16 | 18 => (0, 0, &[]),
            other => bail!("BTF has a type of the unknown kind {other}"),
        };
        // Pointers, aliases, qualifiers, functions, their signatures, variables and tags name a type in place of a size.
        let own = matches!(kind, 2 | 8..=14 | 17 | 18).then_some(at + 8);
        let others = (0..count).flat_map(|index| within.iter().map(move |within| at + TYPE + index * length + within));
        types.push(Type { at, kind, names: own.into_iter().chain(others).collect() });
        at += TYPE + length * count;
    }
    Ok(types)
}

fn name(btf: &[u8], offset: u32) -> Result<Vec<u8>> {
    let names = btf.get(parts(btf)?.1 + offset as usize..).context("a name is outside of the BTF")?;
    Ok(names.iter().copied().take_while(|byte| *byte != 0).collect())
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let word = bytes.get(at..at + 4).context("the BTF is cut off")?;
    Ok(u32::from_le_bytes(word.try_into()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTR: u32 = 2;

    /// Pointers to the types with these numbers, and then declarations of these names.
    fn btf(pointers: &[u32], declared: &[u32]) -> Vec<u8> {
        let types: Vec<[u32; 3]> = pointers
            .iter()
            .map(|to| [0, PTR << 24, *to])
            .chain(declared.iter().map(|name| [*name, FWD << 24, 0]))
            .collect();
        let names = b"\0one\0two\0";
        let length = u32::try_from(types.len() * TYPE).unwrap();
        let header = [0x0001_eb9f, 24, 0, length, length, 9];
        let mut btf: Vec<u8> =
            header.iter().chain(types.iter().flatten()).flat_map(|word| word.to_le_bytes()).collect();
        btf.extend(names);
        btf
    }

    #[test]
    fn declarations_in_any_order_become_the_same_and_pointers_lead_where_they_led() {
        let (one, two) = (1, 5);
        // The first points to `two`.
        let mut ordered = btf(&[4, 3], &[one, two]);
        let mut swapped = btf(&[3, 4], &[two, one]);
        for btf in [&mut ordered, &mut swapped] {
            settle(btf).unwrap();
        }
        assert_eq!(ordered, swapped);
        assert_eq!(ordered, btf(&[4, 3], &[one, two]));
        let mut same = [btf(&[3, 4], &[one, one]), btf(&[4, 3], &[one, one])];
        for btf in &mut same {
            settle(btf).unwrap();
        }
        assert_eq!(same[0], same[1], "two of one name");
    }

    #[test]
    fn names_written_in_any_order_become_the_same() {
        // The same declarations, whose names were written the other way round.
        let mut swapped = btf(&[4, 3], &[5, 1]);
        let names = swapped.len() - 8;
        swapped[names..].copy_from_slice(b"two\0one\0");
        let mut ordered = btf(&[4, 3], &[1, 5]);
        for btf in [&mut ordered, &mut swapped] {
            settle(btf).unwrap();
        }
        assert_eq!(ordered, swapped);
    }

    #[test]
    fn what_is_no_btf_is_told() {
        for bytes in [&b""[..], b"BTF", &[0x9f, 0xeb, 1, 0, 24, 0, 0, 0]] {
            assert!(settle(&mut bytes.to_vec()).is_err());
        }
    }
}
