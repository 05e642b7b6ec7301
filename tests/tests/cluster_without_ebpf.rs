//! With eBPF switched off on every node, the slices alone wake a Service.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use elasti_tests::cluster::{HTTP, Sandbox, Target, from_host, from_pod, kubectl, metric, until};

/// Sets the DaemonSet's environment and waits for its rollout.
fn ebpf(setting: &str) {
    let namespace = elasti_api::names::NAMESPACE;
    kubectl(&["-n", namespace, "set", "env", "daemonset/elasti-resolver", setting]);
    kubectl(&["-n", namespace, "rollout", "status", "daemonset/elasti-resolver", "--timeout=180s"]);
}

/// Keeps out B35: endpoints without `conditions.ready`, slices without owner.
#[test]
fn test_3_the_slices_alone_wake() {
    ebpf("ELASTI_EBPF=off");
    assert!(metric("elasti_resolver_redirect_enabled", "") < 0.5, "eBPF is off on every node");
    {
        let (sandbox, target) = (Sandbox::new("slices"), Target::nginx("web"));
        sandbox.target(&target);
        let address = sandbox.cluster_address(&target, 80);
        for node in [1, 2] {
            sandbox.sleep(&target);
            assert!(sandbox.pods(&target).is_empty(), "no pod existed at the start");
            let answer = from_pod(node, &["curl", "-sS", "--max-time", "60", &format!("http://{address}/")]);
            assert!(answer.starts_with("nginx on web-"), "{answer}");
            sandbox.awake(&target);
        }
        let said = until("the condition says so", || {
            sandbox.condition(&target, "Ready").filter(|(_, reason, _)| reason == "TriggerFailed")
        });
        assert!(said.2.contains("switched off") && said.2.contains("prometheus"), "{said:?}");
        sandbox.sleep(&target);
        assert!(from_host(address, HTTP, 4096).contains("nginx on web-"), "the host");
    }
    ebpf("ELASTI_EBPF-");
    assert!(metric("elasti_resolver_redirect_enabled", "") > 1.5, "and on again");
}
