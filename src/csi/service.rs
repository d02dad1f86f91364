//! The driver's two services, Identity and Node, over gRPC on a unix socket.
//!
//! In: calls of the kubelet. Out: what [`Node`] answers, or a gRPC status whose words `kubectl describe pod` shows.
//! Promises: a call that is not offered is UNIMPLEMENTED; a blocking call runs on a thread of its own; connections and message
//! sizes are bounded. The socket is root's alone.
//! Held by: csi-sanity in tests/kubernetes.sh, the tests below.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;

use futures::future::BoxFuture;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tonic::server::{Grpc, UnaryService};
use tonic::{Code as GrpcCode, Status};

use super::node::Node;
use super::proto::*;
use crate::error::{Class, Code, Error, Result};
use crate::telemetry::scrub;

/// The kubelet keeps one connection, and opens one for each probe and each registration.
const CONNECTIONS_MAX: usize = 32;
/// An event holds 1024 bytes; what comes first is what helps.
const MESSAGE_BYTES_MAX: usize = 900;

/// A socket at `path` that only root may connect to, in place of one that a driver before us left.
///
/// # Errors
/// `HOST` naming the folder that is not there or not writable.
pub fn listen(path: &Path) -> Result<UnixListener> {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    let fault = |e| Error::new(Code::Host, format!("cannot listen at {}", path.display())).with_source(e);
    if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
        std::fs::remove_file(path).map_err(fault)?;
    }
    let listener = UnixListener::bind(path).map_err(fault)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(fault)?;
    Ok(listener)
}

/// Answers connections, as many as allowed at once, each by `answer`, for ever.
pub async fn accept<F>(listener: UnixListener, answer: impl Fn(UnixStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let permit = room.clone().acquire_owned().await.expect("never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let answered = answer(stream);
                tokio::spawn(async move {
                    answered.await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of descriptors, say: the next one may be taken again.
                tracing::warn!("a connection of the kubelet was lost: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

/// One connection to its end.
pub async fn serve(node: Arc<Node>, stream: UnixStream) {
    let service = hyper::service::service_fn(move |request| {
        let node = node.clone();
        async move { Ok::<_, Infallible>(dispatch(node, request).await) }
    });
    let mut server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    server.max_concurrent_streams(64).max_header_list_size(16 << 10);
    if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!("a connection of the kubelet ended: {error}");
    }
}

type Answered = http::Response<tonic::body::Body>;

async fn dispatch(node: Arc<Node>, request: http::Request<Incoming>) -> Answered {
    let path = request.uri().path().to_owned();
    match path.as_str() {
        "/csi.v1.Identity/GetPluginInfo" => {
            unary(request, move |_: Empty| {
                Ok(GetPluginInfoResponse {
                    name: node.name().to_owned(),
                    vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
                })
            })
            .await
        }
        // No controller, no topology: a node driver alone.
        "/csi.v1.Identity/GetPluginCapabilities" => unary(request, |_: Empty| Ok(Empty {})).await,
        "/csi.v1.Identity/Probe" => {
            unary(request, |_: Empty| Ok(ProbeResponse { ready: Some(BoolValue { value: true }) })).await
        }
        "/csi.v1.Node/NodeGetCapabilities" => {
            unary(request, |_: Empty| {
                let rpc = Some(Rpc { kind: RpcType::VolumeMountGroup as i32 });
                Ok(NodeGetCapabilitiesResponse { capabilities: vec![NodeServiceCapability { rpc }] })
            })
            .await
        }
        "/csi.v1.Node/NodeGetInfo" => {
            unary(request, move |_: Empty| {
                Ok(NodeGetInfoResponse {
                    node_id: node.id().to_owned(),
                    max_volumes_per_node: node.volumes_max() as i64,
                })
            })
            .await
        }
        "/csi.v1.Node/NodePublishVolume" => unary(request, move |asked| node.publish(&asked).map(|()| Empty {})).await,
        "/csi.v1.Node/NodeUnpublishVolume" => {
            unary(request, move |asked| node.unpublish(&asked).map(|()| Empty {})).await
        }
        other => {
            let shown: String = other.chars().take(80).collect();
            Status::unimplemented(format!("this driver does not offer {shown}")).into_http()
        }
    }
}

/// What is said to the kubelet when a call fails.
#[derive(Debug)]
pub struct Refusal {
    pub code: GrpcCode,
    pub message: String,
}

impl Refusal {
    pub fn new(code: GrpcCode, message: impl Into<String>) -> Refusal {
        Refusal { code, message: message.into() }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        // It ends in the events of a pod, which more people read than the driver's log.
        Refusal::new(grpc_code(&error), format!("{} [{}]", scrub(&error.chain()), error.code()))
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Status {
        let mut message = refusal.message;
        if message.len() > MESSAGE_BYTES_MAX {
            let end = (0..=MESSAGE_BYTES_MAX).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
            message.truncate(end);
        }
        Status::new(refusal.code, message)
    }
}

/// Every class has one code. The kubelet tries again in any case; UNAVAILABLE and the like also make it expect that the volume
/// may be there half.
fn grpc_code(error: &Error) -> GrpcCode {
    match error.class() {
        // The request is fine; what lies at its target has to go first.
        Class::Usage if error.code() == Code::MountPoint => GrpcCode::FailedPrecondition,
        Class::Usage => GrpcCode::InvalidArgument,
        Class::Denied => GrpcCode::PermissionDenied,
        Class::NotFound => GrpcCode::NotFound,
        Class::Unreachable => GrpcCode::Unavailable,
        Class::NoRoom => GrpcCode::ResourceExhausted,
        Class::Tampered => GrpcCode::DataLoss,
        Class::Changed => GrpcCode::Aborted,
        Class::Held | Class::Insecure => GrpcCode::FailedPrecondition,
        Class::Host => GrpcCode::Internal,
    }
}

/// One call whose answer is worked out on a thread that may block.
async fn unary<Q, A>(
    request: http::Request<Incoming>,
    work: impl FnOnce(Q) -> Result<A, Refusal> + Send + 'static,
) -> Answered
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
{
    let call = Call(Some(Box::new(work) as Work<Q, A>));
    Grpc::new(tonic_prost::ProstCodec::default()).unary(call, request).await
}

type Work<Q, A> = Box<dyn FnOnce(Q) -> Result<A, Refusal> + Send>;

struct Call<Q, A>(Option<Work<Q, A>>);

impl<Q: Send + 'static, A: Send + 'static> UnaryService<Q> for Call<Q, A> {
    type Response = A;
    type Future = BoxFuture<'static, Result<tonic::Response<A>, Status>>;

    fn call(&mut self, request: tonic::Request<Q>) -> Self::Future {
        let work = self.0.take().expect("tonic calls a unary service once");
        Box::pin(async move {
            let question = request.into_inner();
            let answered = tokio::task::spawn_blocking(move || work(question)).await;
            // Nobody knows how far it came: the kubelet is not to take the volume for one that is not there.
            let answer =
                answered.map_err(|_| Status::unavailable("the driver met a fault of its own; its log says where"))?;
            Ok(tonic::Response::new(answer?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_of_vault_is_permission_denied_and_an_outage_is_unavailable() {
        for (code, want) in [
            (Code::VaultDenied, GrpcCode::PermissionDenied),
            (Code::NoKey, GrpcCode::PermissionDenied),
            (Code::VaultSealed, GrpcCode::Unavailable),
            (Code::Usage, GrpcCode::InvalidArgument),
            (Code::MountPoint, GrpcCode::FailedPrecondition),
            (Code::NotFound, GrpcCode::NotFound),
            (Code::ChunkHash, GrpcCode::DataLoss),
        ] {
            assert_eq!(Refusal::from(Error::new(code, "x")).code, want, "{code}");
        }
    }

    #[test]
    fn an_event_of_a_pod_holds_no_credential() {
        let told =
            Refusal::from(Error::new(Code::StoreDenied, "GET https://s3/x?X-Amz-Signature=abcdef0123 was refused"));
        assert!(told.message.contains("was refused") && !told.message.contains("abcdef0123"), "{}", told.message);
    }

    #[test]
    fn a_long_message_is_cut_where_an_event_would_cut_it() {
        let status = Status::from(Refusal::new(GrpcCode::Internal, "ä".repeat(2000)));
        assert!(status.message().len() <= MESSAGE_BYTES_MAX && status.message().starts_with('ä'));
    }

    #[tokio::test]
    async fn a_socket_left_behind_is_replaced_and_is_roots_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("csi.sock");
        drop(listen(&path).expect("first"));
        let _listener = listen(&path).expect("again");
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        std::fs::write(folder.path().join("file"), "x").expect("written");
        listen(&folder.path().join("file")).expect_err("a file is not removed");
    }
}
