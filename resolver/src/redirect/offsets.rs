//! Where fields are in the running kernel's structures, as its own type information (BTF) says.
//!
//! The format is that of the kernel's Documentation/bpf/btf.rst. Pure but for [`Offsets::of_this_kernel`]. Used by
//! [`super::Redirector`].

/// Where the kernel has its type information.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// First two bytes of it, in the order of the machine.
const MAGIC: u16 = 0xeb9f;

/// Kinds of types, and how many bytes follow the 12 that each has: for each of its members, and once.
const KIND_STRUCT: u32 = 4;

/// Offsets of fields, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offsets {
    /// Of `bytes_received` in `struct tcp_sock`.
    pub(super) bytes_received: u32,
    /// Of `bytes_acked` in `struct tcp_sock`.
    pub(super) bytes_acked: u32,
    /// Of `skc_state` in `struct sock_common`, with which a `struct tcp_sock` begins.
    pub(super) state: u32,
}

impl Offsets {
    /// Asks the running kernel; the error says what it lacks.
    pub(super) fn of_this_kernel() -> Result<Self, String> {
        let btf = std::fs::read(VMLINUX).map_err(|error| {
            format!("the kernel tells nothing of its types (CONFIG_DEBUG_INFO_BTF): {VMLINUX}: {error}")
        })?;
        Self::read(&btf).ok_or_else(|| format!("{VMLINUX} does not describe TCP sockets as expected"))
    }

    fn read(btf: &[u8]) -> Option<Self> {
        Some(Self {
            bytes_received: offset(btf, "tcp_sock", "bytes_received")?,
            bytes_acked: offset(btf, "tcp_sock", "bytes_acked")?,
            state: offset(btf, "sock_common", "skc_state")?,
        })
    }
}

/// The offset of a member that stands in a structure itself, not in one within it.
fn offset(btf: &[u8], structure: &str, member: &str) -> Option<u32> {
    let half = |at: usize| Some(u16::from_ne_bytes(*btf.get(at..)?.first_chunk()?));
    let word = |at: usize| Some(u32::from_ne_bytes(*btf.get(at..)?.first_chunk()?));
    let long = |at: usize| word(at).and_then(|word| usize::try_from(word).ok());
    if half(0)? != MAGIC {
        return None;
    }
    let header = long(4)?;
    let (types, types_end) = (header + long(8)?, header + long(8)? + long(12)?);
    let strings = header + long(16)?;
    let named = |at: usize, name: &str| {
        let text = btf.get(strings + long(at)?..)?;
        Some(text.starts_with(name.as_bytes()) && text.get(name.len()) == Some(&0))
    };
    let mut at = types;
    while at < types_end {
        let info = word(at + 4)?;
        let (kind, members) = ((info >> 24) & 0x1f, usize::try_from(info & 0xffff).ok()?);
        if kind == KIND_STRUCT && named(at, structure)? {
            for member_at in (0..members).map(|number| at + 12 + 12 * number) {
                if named(member_at, member)? {
                    // With the flag, the upper byte is the size of a bit field.
                    let bits = word(member_at + 8)? & if info >> 31 == 1 { 0x00ff_ffff } else { u32::MAX };
                    return Some(bits / 8);
                }
            }
        }
        at += 12 + following(kind, members)?;
    }
    None
}

/// Bytes that follow a type; `None` for a kind that nobody knew when this was written.
fn following(kind: u32, members: usize) -> Option<usize> {
    Some(match kind {
        // Integers, variables, tags of declarations.
        1 | 14 | 17 => 4,
        // Arrays.
        3 => 12,
        // Structures, unions, sections, enumerations of 64 bits.
        4 | 5 | 15 | 19 => 12 * members,
        // Enumerations, prototypes.
        6 | 13 => 8 * members,
        // Pointers, forward declarations, type definitions, qualifiers, functions, floating point numbers, tags of types.
        2 | 7..=12 | 16 | 18 => 0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Type information of an integer and of a structure `pair` with members at 4 and, as a bit field, at 8.
    fn btf() -> Vec<u8> {
        let strings = b"\0int\0pair\0first\0second\0";
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        let mut types = words(&[1, 1 << 24, 4, 32]);
        types.extend(words(&[5, (1 << 31) | (4 << 24) | 2, 12, 10, 1, 32, 16, 1, (8 << 24) | 64]));
        let lengths = [u32::try_from(types.len()).unwrap(), u32::try_from(strings.len()).unwrap()];
        let mut btf = [&MAGIC.to_ne_bytes()[..], &[1, 0]].concat();
        btf.extend(words(&[24, 0, lengths[0], lengths[0], lengths[1]]));
        [btf, types, strings.to_vec()].concat()
    }

    #[test]
    fn members_are_found_by_name() {
        let btf = btf();
        assert_eq!(offset(&btf, "pair", "first"), Some(4));
        assert_eq!(offset(&btf, "pair", "second"), Some(8));
        assert_eq!(offset(&btf, "pair", "fir"), None);
        assert_eq!(offset(&btf, "int", "first"), None);
    }

    #[test]
    fn garbage_has_no_members() {
        let whole = btf();
        for length in 0..whole.len() {
            let _found = offset(&whole[..length], "pair", "third");
        }
        assert_eq!(offset(b"no BTF at all", "pair", "first"), None);
    }
}
