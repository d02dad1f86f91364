#!/bin/sh
# Run inside the vault image: a transit key, and who may do what with it.
set -eu
vault secrets enable transit
vault write -f transit/keys/models
vault policy write publisher - <<'HCL'
path "transit/encrypt/models" { capabilities = ["update"] }
path "transit/decrypt/models" { capabilities = ["update"] }
path "transit/datakey/plaintext/models" { capabilities = ["update"] }
HCL
vault policy write volumes - <<'HCL'
path "transit/decrypt/models" { capabilities = ["update"] }
HCL
umask 077
for role in publisher volumes; do
  vault token create -policy=$role -ttl=1h -field=token >/out/$role
done
