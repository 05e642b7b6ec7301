//! Whatever fails between operator and API server, at whichever step: the way down and the way up come to their end, with
//! nothing to repair by hand, and never in another order.

use std::time::{Duration, Instant};

use elasti_tests::api::{
    Cluster, Done, Fault, FaultyWay, Operator, Prometheus, Resolver, Sandbox, Says, deployment, elasti_service,
    interception_port, ready_endpoint, service, until,
};
use http::Method;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

const SCALE: &str = "/deployments/web/scale";
const STATUS: &str = "/elastiservices/web/status";
const SLICE: &str = "/endpointslices/";

struct World {
    sandbox: Sandbox,
    way: FaultyWay,
    prometheus: Prometheus,
    resolver: Resolver,
    _operator: Operator,
}

impl World {
    /// A target with so many replicas, which is idle, and an operator whose way to the API server may fail.
    async fn new(cluster: &Cluster, replicas: u32) -> Self {
        let (sandbox, way) = (cluster.sandbox().await, FaultyWay::new().await);
        let prometheus = Prometheus::new(Says::Nothing).await;
        let operator = cluster.operator_by(&way, "a").await;
        let resolver = cluster.resolver(&[&operator]).await;
        sandbox.create(deployment("web", replicas)).await;
        sandbox.create(service("web", json!({}))).await;
        if replicas > 0 {
            sandbox.create(ready_endpoint("web", "10.1.2.3:80".parse().unwrap())).await;
        }
        let spec = json!({"cooldownPeriod": 1, "triggers": [prometheus.trigger()]});
        sandbox.create(elasti_service("web", spec)).await;
        if replicas > 0 {
            sandbox
                .until("web", "mode serve and ports", |elasti| {
                    elasti["status"]["mode"] == "serve" && elasti["status"]["ports"].is_array()
                })
                .await;
        } else {
            sandbox.until_published("web").await;
        }
        Self { sandbox, way, prometheus, resolver, _operator: operator }
    }

    /// The name of the slice that leads to resolvers.
    fn slice() -> String {
        SLICE.to_owned() + &elasti_api::names::resolver_slice("web", false)
    }

    async fn falls_asleep(&self) {
        self.prometheus.say(Says::Idle);
        until("the target sleeps", async || (self.sandbox.replicas("web").await == 0).then_some(())).await;
        assert!(self.way.all_have_failed(), "what should fail has failed");
        // The target is at zero before the way has heard so from the API server.
        let carried_out = |done: &Done| done.path.ends_with(SCALE) && done.body.contains(r#""replicas":0"#);
        until("the scale-down is answered", async || self.way.done().iter().any(carried_out).then_some(())).await;
        let done = self.way.done();
        let at = |what: &str, is: &dyn Fn(&Done) -> bool| {
            done.iter().position(is).unwrap_or_else(|| panic!("{what} is not among {done:#?}"))
        };
        let status = at("the status", &|done| done.path.ends_with(STATUS) && done.body.contains(r#""mode":"proxy""#));
        let slice = at("the slice", &|done| done.path.ends_with(&Self::slice()) && done.method == Method::PATCH);
        let scale = at("the scale-down", &carried_out);
        assert!(status < slice && slice < scale, "intercepted, published, and only then scaled: {done:#?}");
        let scaled: Value = serde_json::from_str(&done[scale].body).unwrap();
        assert!(scaled["metadata"]["resourceVersion"].is_string(), "nobody else's change is overwritten");
        let count = done.iter().filter(|done| done.path.ends_with(SCALE)).count();
        assert_eq!(count, 1, "it is not repeated once it was carried out");
    }

    /// A client is held, and its target woken.
    async fn wakes(&self) {
        let elasti = self.sandbox.until_published("web").await;
        let _client = self.resolver.dial(interception_port(&elasti, 80)).await;
        until("the target is woken", async || (self.sandbox.replicas("web").await == 1).then_some(())).await;
    }
}

/// Puts a target to sleep while the first requests of each step fail in this way, and wakes it again.
async fn down_and_up(fault: Fault) {
    let cluster = Cluster::new().await;
    let world = World::new(&cluster, 1).await;
    // Where its answer is lost it was carried out: there is nothing to repeat.
    let times = if fault == Fault::AnswerLost { 1 } else { 2 };
    world.way.fail(Method::PATCH, STATUS, fault, times);
    world.way.fail(Method::PATCH, &World::slice(), fault, times);
    world.way.fail(Method::PATCH, SCALE, fault, times);
    world.falls_asleep().await;
    // The endpoints' controller.
    world.sandbox.delete::<k8s_openapi::api::discovery::v1::EndpointSlice>("web").await;
    world.way.fail(Method::PATCH, SCALE, fault, times);
    world.way.fail(Method::GET, SCALE, fault, 1);
    world.wakes().await;
}

#[tokio::test]
async fn every_step_is_taken_though_the_api_server_is_overloaded_at_first() {
    down_and_up(Fault::Refused(429)).await;
}

#[tokio::test]
async fn every_step_is_taken_though_the_api_server_fails_at_first() {
    down_and_up(Fault::Refused(500)).await;
}

/// Keeps out B22: stale caches leave slices behind.
#[tokio::test]
async fn every_step_is_taken_though_somebody_else_is_faster_at_first() {
    down_and_up(Fault::Refused(409)).await;
}

#[tokio::test]
async fn every_step_is_taken_though_answers_are_lost_at_first() {
    down_and_up(Fault::AnswerLost).await;
}

#[tokio::test]
async fn a_wake_that_nobody_answers_is_repeated() {
    let cluster = Cluster::new().await;
    let world = World::new(&cluster, 0).await;
    world.way.fail(Method::PATCH, SCALE, Fault::Swallowed, 1);
    world.wakes().await;
    assert!(world.way.all_have_failed());
}

#[tokio::test]
async fn a_scale_down_that_is_carried_out_late_finds_its_service_intercepted() {
    let cluster = Cluster::new().await;
    let world = World::new(&cluster, 1).await;
    world.way.fail(Method::PATCH, SCALE, Fault::Late, 1);
    world.prometheus.say(Says::Idle);
    until("the scale-down is sent", async || (world.way.late() == 1).then_some(())).await;
    // The operator gives it up after 5 s; meanwhile there is traffic again.
    world.prometheus.say(Says::Busy);
    let asked = world.prometheus.asked();
    until("the operator has given it up and looked again", async || {
        (world.prometheus.asked() > asked + 80).then_some(())
    })
    .await;
    let elasti = world.sandbox.until_published("web").await;
    assert_eq!(elasti["status"]["mode"], "proxy", "nobody knows yet what has become of it");
    world.way.release();
    // It is at zero for a moment only: a trigger that sees traffic wakes it, as a held connection would.
    let scaled = |to: &str| world.way.done().iter().any(|done| done.path.ends_with(SCALE) && done.body.contains(to));
    until("it is carried out", async || scaled(r#""replicas":0"#).then_some(())).await;
    until("the target is woken", async || scaled(r#""replicas":1"#).then_some(())).await;
    let mut until_zero: Vec<Done> = world.way.done();
    let zero = until_zero.iter().position(|done| done.path.ends_with(SCALE)).unwrap();
    until_zero.truncate(zero);
    until_zero.retain(|done| done.path.ends_with(STATUS));
    let proxy = until_zero.iter().position(|done| done.body.contains(r#""mode":"proxy""#)).unwrap();
    let given_back = until_zero[proxy..].iter().any(|done| done.body.contains(r#""mode":"serve""#));
    assert!(!given_back, "intercepted until it was carried out: {until_zero:#?}");
}

/// Keeps out B45: informers restart in storms.
#[tokio::test]
async fn watches_that_are_cut_or_fall_silent_are_begun_anew() {
    let cluster = Cluster::new().await;
    let world = World::new(&cluster, 1).await;
    world.way.cut();
    world.sandbox.scale("web", 0).await;
    world.sandbox.until("web", "mode proxy", |elasti| elasti["status"]["mode"] == "proxy").await;
    world.sandbox.scale("web", 1).await;
    world.sandbox.until_served("web").await;
    world.way.freeze();
    world.sandbox.scale("web", 0).await;
    world.sandbox.until("web", "mode proxy", |elasti| elasti["status"]["mode"] == "proxy").await;
}

#[tokio::test]
async fn what_is_held_while_the_api_server_is_gone_is_woken_when_it_is_back() {
    let cluster = Cluster::new().await;
    let world = World::new(&cluster, 0).await;
    let elasti = world.sandbox.until_published("web").await;
    world.way.set_down(true);
    let mut client = world.resolver.dial(interception_port(&elasti, 80)).await;
    // Watches, Lease and wake have all been tried in vain.
    let since = Instant::now();
    until("a while passes", async || (since.elapsed().as_secs() >= 4).then_some(())).await;
    assert_eq!(world.sandbox.replicas("web").await, 0);
    let nothing = tokio::time::timeout(Duration::from_millis(10), client.read_u8()).await;
    assert!(nothing.is_err(), "it is held all the while");
    world.way.set_down(false);
    until("the target is woken", async || (world.sandbox.replicas("web").await == 1).then_some(())).await;
}

#[tokio::test]
async fn a_target_that_somebody_keeps_at_zero_is_woken_again_for_what_is_held_but_in_no_storm() {
    let cluster = Cluster::new().await;
    let world = World::new(&cluster, 0).await;
    let elasti = world.sandbox.until_published("web").await;
    let _client = world.resolver.dial(interception_port(&elasti, 80)).await;
    let begun = Instant::now();
    let wakes = 5;
    for _ in 0..wakes {
        until("the target is woken", async || (world.sandbox.replicas("web").await == 1).then_some(())).await;
        world.sandbox.scale("web", 0).await;
    }
    until("the target is woken", async || (world.sandbox.replicas("web").await == 1).then_some(())).await;
    // 0 + 0 + 200 + 400 + 800 + 1600 ms, by the operator's own clock.
    assert!(begun.elapsed() >= Duration::from_secs(3), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_private_service_that_is_refused_keeps_no_target_from_being_intercepted_and_woken() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let way = FaultyWay::new().await;
    let private = format!("/services/{}", elasti_api::names::private_service("web"));
    way.fail(Method::PATCH, &private, Fault::Refused(403), u32::MAX);
    let operator = cluster.operator_by(&way, "a").await;
    let resolver = cluster.resolver(&[&operator]).await;
    sandbox.create(deployment("web", 0)).await;
    sandbox.create(service("web", json!({}))).await;
    sandbox.create(elasti_service("web", json!({}))).await;
    let elasti = sandbox.until_published("web").await;
    let _client = resolver.dial(interception_port(&elasti, 80)).await;
    until("the target is woken", async || (sandbox.replicas("web").await == 1).then_some(())).await;
}
