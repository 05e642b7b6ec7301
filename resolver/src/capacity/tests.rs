use super::*;

const GIB: u64 = 1 << 30;
const PLENTY: Limits = Limits { descriptors: 1 << 20, memory: Some(GIB), conntrack: None };

fn places(limits: Limits) -> u64 {
    let full = |connections: &u64| refusal(limits, Usage { connections: *connections, ..Usage::default() }).is_some();
    (0..100_000).find(full).unwrap()
}

#[test]
fn the_default_limit_of_memory_bears_the_default_limit_of_held_connections() {
    assert!(places(PLENTY) > 10_000, "{}", places(PLENTY));
    let busy = Usage { connections: 10_000, of_this_port: 10_000, ..Usage::default() };
    assert_eq!(refusal(PLENTY, busy), None, "of one port alone");
}

#[test]
fn the_scarcer_of_files_and_memory_is_named() {
    let full = Usage { connections: 1 << 30, ..Usage::default() };
    assert_eq!(refusal(PLENTY, full), Some(Refusal::Memory));
    assert_eq!(refusal(Limits { memory: None, ..PLENTY }, full), Some(Refusal::Descriptors));
    assert_eq!(refusal(Limits { descriptors: 1024, ..PLENTY }, full), Some(Refusal::Descriptors));
}

#[test]
fn half_of_what_the_node_can_track_is_left_to_others() {
    let limits = Limits { conntrack: Some(4000), ..PLENTY };
    assert_eq!(places(limits), 1000);
    let full = Usage { connections: 1000, ..Usage::default() };
    assert_eq!(refusal(limits, full), Some(Refusal::Conntrack));
}

#[test]
fn every_place_has_both_its_files_and_listeners_have_theirs() {
    let limits = Limits { descriptors: OTHER_DESCRIPTORS + 1000, memory: None, conntrack: None };
    assert_eq!(places(limits), 500);
    let listening = Usage { connections: 400, listeners: 200, ..Usage::default() };
    assert_eq!(refusal(limits, listening), Some(Refusal::Descriptors));
}

#[test]
fn memory_in_use_refuses_before_the_limit_whatever_it_is_used_for() {
    let usage = Usage { memory: GIB - GIB / 8 + 1, ..Usage::default() };
    assert_eq!(refusal(PLENTY, usage), Some(Refusal::Memory));
    assert_eq!(refusal(Limits { memory: None, ..PLENTY }, usage), None);
    let none = Limits { memory: Some(0), ..PLENTY };
    assert_eq!(refusal(none, Usage::default()), Some(Refusal::Memory));
}

#[test]
fn busy_ports_leave_places_for_others() {
    let capacity = Capacity::new(
        Limits { descriptors: OTHER_DESCRIPTORS + 2 * 300, memory: None, conntrack: None },
        Metrics::new(&prometheus::Registry::new()).unwrap(),
    );
    let shares: Vec<Share> = (0..5).map(|_| capacity.share()).collect();
    let mut permits = Vec::new();
    for share in &shares {
        let before = permits.len();
        while let Ok(permit) = share.admit() {
            permits.push(permit);
        }
        assert!(permits.len() > before, "each later one gets some too");
    }
    assert_eq!(shares[0].admit().unwrap_err(), Refusal::Share);
    permits.clear();
    assert!(shares[0].admit().is_ok());
}

#[test]
fn limits_are_read_from_both_versions_of_cgroups() {
    let root = tempfile::tempdir().unwrap();
    let write = |file: &str, text: &str| std::fs::write(root.path().join(file), text).unwrap();
    assert_eq!(Memory::of(root.path()).limit, None, "no cgroup at all");
    write("memory.max", "max\n");
    assert_eq!(Memory::of(root.path()).limit, None, "no limit");
    write("memory.max", "1000\n");
    write("memory.current", "600\n");
    let memory = Memory::of(root.path());
    assert_eq!((memory.limit, memory.used()), (Some(1000), 600));
    write("memory.current", "990\n");
    write("memory.stat", "anon 1\ninactive_file 400\nactive_file 7\n");
    assert_eq!(memory.used(), 590, "without what the kernel takes back");
    std::fs::create_dir(root.path().join("memory")).unwrap();
    write("memory/memory.limit_in_bytes", "2000\n");
    write("memory/memory.usage_in_bytes", "1990\n");
    write("memory/memory.stat", "inactive_file 1\ntotal_inactive_file 90\n");
    let memory = Memory::of(root.path());
    assert_eq!((memory.limit, memory.used()), (Some(2000), 1900));
}
