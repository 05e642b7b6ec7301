//! `config/` says what the code says: names, ports, flags, permissions. No cluster is needed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use clap::{CommandFactory, FromArgMatches};
use elasti_api::names;
use elasti_api::v1alpha1::ElastiService;
use elasti_operator::permissions::{PERMISSIONS, Scope};
use elasti_runtime::config::command;
use kube::CustomResourceExt;
use serde::Deserialize;
use serde_json::{Value, json};

fn config() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../config")
}

/// The objects of a YAML file.
fn objects_in(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap();
    serde_yaml_ng::Deserializer::from_str(&text)
        .map(|document| Value::deserialize(document).unwrap_or_else(|error| panic!("{}: {error}", file.display())))
        .collect()
}

/// What is only used as a part of something else, or for one namespace.
fn role(file: &str) -> Value {
    objects_in(&config().join(file)).remove(0)
}

/// The YAML files of a directory without its kustomization, sorted.
fn files_of(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.is_file() && file.file_name().unwrap() != "kustomization.yaml");
    files.sort();
    files
}

fn directories() -> Vec<PathBuf> {
    let entries = fs::read_dir(config()).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_dir()).collect()
}

fn kustomization(directory: &Path) -> Value {
    objects_in(&directory.join("kustomization.yaml")).remove(0)
}

fn resources(kustomization: &Value) -> BTreeSet<&str> {
    list(&kustomization["resources"]).iter().map(text).collect()
}

/// Everything that `kubectl apply -k config/default` makes.
fn installation() -> Vec<Value> {
    let default = config().join("default");
    let kustomization = kustomization(&default);
    let components = list(&kustomization["components"]).iter().map(text);
    let files = resources(&kustomization).into_iter().chain(components).flat_map(|resource| {
        let path = default.join(resource);
        if path.is_dir() { files_of(&path) } else { vec![path] }
    });
    files.flat_map(|file| objects_in(&file)).collect()
}

fn object(kind: &str, name: &str) -> Value {
    let wanted = |object: &Value| object["kind"] == kind && object["metadata"]["name"] == name;
    installation().into_iter().find(wanted).unwrap_or_else(|| panic!("there is no {kind} {name}"))
}

fn of_kind(kind: &str) -> Vec<Value> {
    installation().into_iter().filter(|object| object["kind"] == kind).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no string"))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The item of a list with this name.
fn named<'a>(items: &'a Value, name: &str) -> &'a Value {
    list(items).iter().find(|item| item["name"] == name).unwrap_or_else(|| panic!("no {name} in {items}"))
}

fn operator() -> Value {
    object("Deployment", names::OPERATOR)["spec"]["template"].take()
}

fn resolver() -> Value {
    object("DaemonSet", names::RESOLVER)["spec"]["template"].take()
}

/// A program's arguments as its container's environment gives them, every variable known to the program.
fn arguments<A: CommandFactory + FromArgMatches>(pod: &Value) -> A {
    let variables = list(&pod["spec"]["containers"][0]["env"]);
    let mut values = BTreeMap::new();
    for variable in variables {
        let value = match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
            None => text(&variable["value"]).to_owned(),
            Some("metadata.name") => "the-pod".to_owned(),
            Some("metadata.namespace") => names::NAMESPACE.to_owned(),
            Some("spec.nodeName") => "the-node".to_owned(),
            Some("status.podIPs") => "10.0.0.1,fd00::1".to_owned(),
            Some(other) => panic!("what is {other}?"),
        };
        values.insert(text(&variable["name"]), value);
    }
    let expand = |value: &str| {
        values.iter().fold(value.to_owned(), |value, (name, with)| value.replace(&format!("$({name})"), with))
    };
    let command = command::<A>();
    let mut arguments = vec![command.get_name().to_owned()];
    for (name, value) in &values {
        if values.values().any(|value| value.contains(&format!("$({name})"))) {
            continue;
        }
        let flag = command.get_arguments().find(|argument| argument.get_env().is_some_and(|env| env == *name));
        let flag = flag.unwrap_or_else(|| panic!("{} knows no {name}", command.get_name()));
        arguments.push(format!("--{}={}", flag.get_long().unwrap(), expand(value)));
    }
    elasti_runtime::config::parse(arguments.into_iter().map(Into::into)).expect("the arguments are known")
}

fn resolver_config() -> elasti_resolver::config::Config {
    elasti_resolver::config::Config::new(&arguments(&resolver())).expect("the resolver takes its environment")
}

fn operator_config() -> elasti_operator::config::Config {
    elasti_operator::config::Config::new(&arguments(&operator())).expect("the operator takes its environment")
}

#[test]
fn every_file_belongs_to_a_kustomization_and_every_resource_exists() {
    for directory in directories() {
        let kustomization = kustomization(&directory);
        let resources = resources(&kustomization);
        for resource in &resources {
            assert!(directory.join(resource).exists(), "{resource} of {}", directory.display());
        }
        let generated: Vec<&str> = list(&kustomization["configMapGenerator"])
            .iter()
            .flat_map(|map| list(&map["files"]))
            .map(|file| text(file).rsplit('=').next().unwrap())
            .collect();
        for file in files_of(&directory) {
            let name = file.file_name().unwrap().to_str().unwrap();
            assert!(resources.contains(name) || generated.contains(&name), "{} is in no kustomization", file.display());
        }
    }
}

#[test]
fn the_installation_is_this_and_no_more() {
    let of = |object: &Value| format!("{} {}", text(&object["kind"]), text(&object["metadata"]["name"]));
    let mut found: Vec<String> = installation().iter().map(of).collect();
    let mut wanted = vec![
        format!("ClusterRole {}", names::OPERATOR),
        format!("ClusterRole {}-other-targets", names::OPERATOR),
        format!("ClusterRole {}-tokens", names::OPERATOR),
        format!("ClusterRoleBinding {}", names::OPERATOR),
        format!("ClusterRoleBinding {}-other-targets", names::OPERATOR),
        format!("ClusterRoleBinding {}-tokens", names::OPERATOR),
        format!("CustomResourceDefinition elastiservices.{}", names::GROUP),
        format!("DaemonSet {}", names::RESOLVER),
        format!("Deployment {}", names::OPERATOR),
        format!("Namespace {}", names::NAMESPACE),
        format!("PodDisruptionBudget {}", names::OPERATOR),
        format!("Role {}", names::OPERATOR),
        format!("RoleBinding {}", names::OPERATOR),
        format!("Service {}", names::OPERATOR_SERVICE),
        format!("Service {}", names::OPERATOR_STREAM_SERVICE),
        "Service elasti-resolver-service".to_owned(),
        format!("ServiceAccount {}", names::OPERATOR),
        format!("ServiceAccount {}", names::RESOLVER),
    ];
    found.sort();
    wanted.sort();
    assert_eq!(found, wanted);
}

#[test]
fn everything_is_in_the_namespace_of_the_code() {
    const OF_NO_NAMESPACE: [&str; 4] = ["ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Namespace"];
    for object in installation() {
        let namespace =
            if OF_NO_NAMESPACE.contains(&text(&object["kind"])) { Value::Null } else { names::NAMESPACE.into() };
        assert_eq!(object["metadata"]["namespace"], namespace, "{object}");
    }
    assert_eq!(operator_config().namespace, names::NAMESPACE);
}

#[test]
fn the_crd_is_the_one_of_the_types() {
    let generated = serde_json::to_value(ElastiService::crd()).unwrap();
    let committed = of_kind("CustomResourceDefinition").remove(0);
    assert!(committed == generated, "config/crd is stale: run `cargo xtask crd`");
}

#[test]
fn samples_say_nothing_that_the_types_do_not_know() {
    let samples: Vec<Value> = files_of(&config().join("samples")).iter().flat_map(|file| objects_in(file)).collect();
    let kinds: Vec<&str> = samples.iter().map(|sample| text(&sample["spec"]["scaleTargetRef"]["kind"])).collect();
    assert_eq!(kinds, ["Deployment", "StatefulSet"]);
    for sample in samples {
        let typed: ElastiService = serde_json::from_value(sample.clone()).unwrap();
        assert!(contains(&serde_json::to_value(typed).unwrap(), &sample), "a field of {sample} is unknown");
    }
}

/// Whether `part` is in `whole`, field by field.
fn contains(whole: &Value, part: &Value) -> bool {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            part.iter().all(|(key, part)| whole.get(key).is_some_and(|whole| contains(whole, part)))
        }
        (Value::Array(whole), Value::Array(part)) => {
            whole.len() == part.len() && whole.iter().zip(part).all(|(whole, part)| contains(whole, part))
        }
        _ => whole == part,
    }
}

#[test]
fn services_lead_to_the_ports_that_the_programs_listen_on() {
    let wanted = [
        (names::OPERATOR_SERVICE, operator(), vec![names::OPERATOR_PORT]),
        (names::OPERATOR_STREAM_SERVICE, operator(), vec![names::OPERATOR_STREAM_PORT]),
        ("elasti-resolver-service", resolver(), vec![names::RESOLVER_PORT, names::RESOLVER_PROXY_PORT]),
    ];
    for (service, pod, numbers) in wanted {
        let spec = object("Service", service)["spec"].take();
        assert!(contains(&pod["metadata"]["labels"], &spec["selector"]), "{service} selects its pods");
        assert_eq!(list(&spec["ports"]).len(), numbers.len(), "{service}");
        for (port, number) in list(&spec["ports"]).iter().zip(numbers) {
            assert_eq!(port["port"], number, "{service}");
            let target = named(&pod["spec"]["containers"][0]["ports"], text(&port["targetPort"]));
            assert_eq!(target["containerPort"], number, "{service}");
        }
    }
    let stream = object("Service", names::OPERATOR_STREAM_SERVICE);
    assert_eq!(stream["spec"]["clusterIP"], "None", "its name resolves to every replica");
    let (operator, resolver) = (operator_config(), resolver_config());
    assert_eq!((operator.port, operator.stream_port), (names::OPERATOR_PORT, names::OPERATOR_STREAM_PORT));
    assert_eq!((resolver.resolver_port, resolver.proxy_port), (names::RESOLVER_PORT, names::RESOLVER_PROXY_PORT));
}

#[test]
fn probes_and_scrapers_ask_where_the_answer_is() {
    let (health, scraped) = (operator_config().health_port, [operator_config().port, resolver_config().resolver_port]);
    assert_eq!(health, names::OPERATOR_HEALTH_PORT);
    for ((pod, port), scraped) in [(operator(), health), (resolver(), names::RESOLVER_PORT)].into_iter().zip(scraped) {
        let container = &pod["spec"]["containers"][0];
        for (probe, path) in [("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")] {
            let get = &container[probe]["httpGet"];
            assert_eq!(get["path"], path);
            assert_eq!(named(&container["ports"], text(&get["port"]))["containerPort"], port);
        }
        assert_eq!(pod["metadata"]["annotations"]["prometheus.io/port"], scraped.to_string());
    }
}

#[test]
fn resolvers_find_the_operators_their_token_and_their_ca() {
    let (config, pod) = (resolver_config(), resolver()["spec"].take());
    let stream = format!("{}.{}.svc", names::OPERATOR_STREAM_SERVICE, names::NAMESPACE);
    assert_eq!((config.operator_host, config.operator_port), (stream, names::OPERATOR_STREAM_PORT));
    assert_eq!((&*config.pod, &*config.node, config.pod_ips.len()), ("the-pod", "the-node", 2));

    let mounts = &pod["containers"][0]["volumeMounts"];
    let mounted = |volume: &str, file: &str| Path::new(text(&named(mounts, volume)["mountPath"])).join(file);
    let token = &named(&pod["volumes"], "token")["projected"]["sources"][0]["serviceAccountToken"];
    assert_eq!(token["audience"], names::TOKEN_AUDIENCE);
    assert_eq!(mounted("token", text(&token["path"])), config.token_file);
    assert_eq!(named(&pod["volumes"], "ca")["configMap"]["name"], names::CA_CONFIG_MAP);
    assert_eq!(mounted("ca", names::CA_KEY), config.ca_file);
    let accounts = operator_config().allowed_service_accounts;
    assert_eq!(accounts, [format!("{}:{}", names::NAMESPACE, text(&pod["serviceAccountName"]))]);
}

#[test]
fn ports_of_outgoing_connections_are_no_interception_ports() {
    let pod = resolver();
    let sysctl = named(&pod["spec"]["securityContext"]["sysctls"], "net.ipv4.ip_local_port_range");
    let range: Vec<u16> = text(&sysctl["value"]).split(' ').map(|port| port.parse().unwrap()).collect();
    let [first, last] = range[..] else { panic!("{sysctl}") };
    assert!(first < last && (last < names::INTERCEPTION_PORT_MIN || first > names::INTERCEPTION_PORT_MAX));
    const { assert!(names::RESOLVER_PORT < names::INTERCEPTION_PORT_MIN) };
    const { assert!(names::RESOLVER_PROXY_PORT < names::INTERCEPTION_PORT_MIN) };
}

#[test]
fn a_resolver_is_not_killed_while_it_drains() {
    let grace = resolver()["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap();
    assert!(grace > resolver_config().drain_timeout.as_secs() + 1, "a second for the last resets");
}

#[test]
fn programs_have_the_least_privileges() {
    for (pod, added) in [(operator(), json!(null)), (resolver(), json!(["BPF", "NET_ADMIN", "PERFMON"]))] {
        let spec = &pod["spec"];
        assert_eq!(list(&spec["containers"]).len(), 1);
        for host in ["hostNetwork", "hostPID", "hostIPC", "initContainers"] {
            assert_eq!(spec[host], Value::Null);
        }
        assert_eq!(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        let context = &spec["containers"][0]["securityContext"];
        assert_eq!(context["allowPrivilegeEscalation"], false);
        assert_eq!(context["readOnlyRootFilesystem"], true);
        assert_eq!(context["privileged"], Value::Null);
        assert_eq!(context["capabilities"]["drop"], json!(["ALL"]));
        assert_eq!(context["capabilities"]["add"], added);
        for mount in list(&spec["containers"][0]["volumeMounts"]) {
            assert_eq!(mount["readOnly"], true, "{mount}");
        }
    }
    assert_eq!(operator()["spec"]["securityContext"]["runAsNonRoot"], true);
}

#[test]
fn a_disruption_leaves_one_operator() {
    let budget = object("PodDisruptionBudget", names::OPERATOR)["spec"].take();
    assert_eq!(budget["minAvailable"], 1);
    assert!(contains(&operator()["metadata"]["labels"], &budget["selector"]["matchLabels"]));
    assert!(object("Deployment", names::OPERATOR)["spec"]["replicas"].as_u64().unwrap() > 1);
}

#[test]
fn images_are_those_of_xtask_image() {
    let kustomization = kustomization(&config().join("default"));
    for (pod, program) in [(operator(), names::OPERATOR), (resolver(), names::RESOLVER)] {
        let image = format!("docker.io/elasti/{program}");
        assert_eq!(named(&kustomization["images"], &image)["newTag"], "dev");
        assert_eq!(pod["spec"]["containers"][0]["image"], image);
        assert_eq!(pod["spec"]["containers"][0]["imagePullPolicy"], "IfNotPresent");
    }
}

/// (Role or `ClusterRole`, group, resource, object or none, verb)
type Rule = (String, String, String, Option<String>, String);

#[test]
fn the_operator_may_do_what_it_does_and_nothing_else() {
    let needed: BTreeSet<Rule> = PERMISSIONS
        .iter()
        .flat_map(|permission| {
            let role = if permission.scope == Scope::Own { "Role" } else { "ClusterRole" };
            permission.verbs.iter().map(move |verb| {
                let object = permission.object.map(str::to_owned);
                (
                    role.to_owned(),
                    permission.group.to_owned(),
                    permission.resource.to_owned(),
                    object,
                    (*verb).to_owned(),
                )
            })
        })
        .collect();
    let granted: BTreeSet<Rule> =
        ["Role", "ClusterRole"].into_iter().flat_map(of_kind).flat_map(|role| rules(&role)).collect();
    let missing: Vec<_> = needed.difference(&granted).collect();
    let idle: Vec<_> = granted.difference(&needed).collect();
    assert!(missing.is_empty() && idle.is_empty(), "config/rbac lacks {missing:#?} and grants in vain {idle:#?}");
}

fn rules(role: &Value) -> BTreeSet<Rule> {
    let mut rules = BTreeSet::new();
    for rule in list(&role["rules"]) {
        let objects: Vec<Option<&str>> = match list(&rule["resourceNames"]) {
            [] => vec![None],
            names => names.iter().map(|name| Some(text(name))).collect(),
        };
        for group in list(&rule["apiGroups"]) {
            for resource in list(&rule["resources"]) {
                for object in &objects {
                    for verb in list(&rule["verbs"]) {
                        let [role, group, resource, verb] =
                            [&role["kind"], group, resource, verb].map(|v| text(v).to_owned());
                        rules.insert((role, group, resource, object.map(str::to_owned), verb));
                    }
                }
            }
        }
    }
    rules
}

#[test]
fn an_operator_of_some_namespaces_may_do_the_same_there_and_nothing_elsewhere() {
    let (everywhere, watched) = (role("cluster-wide/operator-role.yaml"), role("watched/operator-role.yaml"));
    assert_eq!((&watched["kind"], &watched["rules"]), (&json!("Role"), &everywhere["rules"]));
    assert_eq!(watched["metadata"]["namespace"], Value::Null, "kubectl -n says which");
    let cluster: Vec<&str> =
        PERMISSIONS.iter().filter(|one| one.scope == Scope::Cluster).map(|one| one.resource).collect();
    assert_eq!(cluster, ["tokenreviews"]);
    let tokens = role("rbac/token-role.yaml");
    assert_eq!((&tokens["kind"], list(&tokens["rules"]).len()), (&json!("ClusterRole"), 1));
    assert_eq!(tokens["rules"][0]["resources"], json!(["tokenreviews"]));

    let binding = objects_in(&config().join("watched/operator-role.yaml")).remove(1);
    assert_eq!(binding["roleRef"]["name"], watched["metadata"]["name"]);
    let account = json!([{"kind": "ServiceAccount", "name": names::OPERATOR, "namespace": names::NAMESPACE}]);
    assert_eq!(binding["subjects"], account);

    let component = kustomization(&config().join("namespaced"));
    let patches: Value = serde_yaml_ng::from_str(text(&component["patches"][0]["patch"])).unwrap();
    let variable = &patches[0]["value"];
    let mut pod = operator();
    pod["spec"]["containers"][0]["env"].as_array_mut().unwrap().push(variable.clone());
    let config = elasti_operator::config::Config::new(&arguments(&pod)).unwrap();
    assert_eq!(config.watch_namespaces.join(","), text(&variable["value"]));
}

#[test]
fn only_the_operator_is_bound_to_a_role() {
    for kind in ["RoleBinding", "ClusterRoleBinding"] {
        for binding in of_kind(kind) {
            let name = &binding["metadata"]["name"];
            let role = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": kind.trim_end_matches("Binding"), "name": name});
            assert_eq!(binding["roleRef"], role);
            object(kind.trim_end_matches("Binding"), text(name));
            let account = json!([{"kind": "ServiceAccount", "name": names::OPERATOR, "namespace": names::NAMESPACE}]);
            assert_eq!(binding["subjects"], account);
        }
    }
    assert_eq!(operator()["spec"]["serviceAccountName"], names::OPERATOR);
    assert_eq!(resolver()["spec"]["serviceAccountName"], names::RESOLVER);
    assert_eq!(resolver()["spec"]["automountServiceAccountToken"], false);
    assert_eq!(object("ServiceAccount", names::RESOLVER)["automountServiceAccountToken"], false);
}
