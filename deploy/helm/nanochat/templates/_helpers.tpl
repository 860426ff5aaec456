{{- define "nanochat.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels that select a component's pods. Takes (list $ "component"). */}}
{{- define "nanochat.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* All labels of a component's resource. Takes (list $ "component"). */}}
{{- define "nanochat.labels" -}}
{{- $root := index . 0 -}}
{{ include "nanochat.selectorLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: nanochat
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end -}}

{{/* Image reference of a component. Takes (list $ "component"). */}}
{{- define "nanochat.image" -}}
{{- $root := index . 0 -}}
{{- $values := index $root.Values (index . 1) -}}
{{- with $root.Values.image.registry }}{{ . }}/{{ end }}{{ $values.image }}
{{- if $values.digest }}@{{ $values.digest }}{{ else }}:{{ $root.Values.image.tag | default $root.Chart.AppVersion }}{{ end }}
{{- end -}}

{{/*
"true" if the component's pods should run on one node, because they mount a claim that only one node can use at a time.
An engine mounts the claim while it waits for the model. If the training ran on another node, it could not mount the
claim, and the engine would wait for ever. Takes the arguments of nanochat.podDefaults.
*/}}
{{- define "nanochat.onOneNode" -}}
{{- $root := index . 0 -}}
{{- $store := $root.Values.store -}}
{{- $chosen := hasKey (include "nanochat.podValues" . | fromYaml).pod "affinity" -}}
{{- if and (has (index . 1) (list "engine" "bootstrap" (ternary "gateway" "teacher" $root.Values.teacher.enabled) "teacher" "lesson")) (not $chosen) (eq $store.type "pvc") (not $store.pvc.existingClaim) -}}
{{- if not (without $store.pvc.accessModes "ReadWriteOnce" "ReadWriteOncePod") -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{/* The values of a component's pods. Takes the arguments of nanochat.podDefaults. */}}
{{- define "nanochat.podValues" -}}
{{- if gt (len .) 2 -}}{{- index . 2 | toYaml -}}{{- else -}}{{- index (index . 0).Values (index . 1) | toYaml -}}{{- end -}}
{{- end -}}

{{/* "true" if each lesson is a PyTorchJob; otherwise empty. */}}
{{- define "nanochat.lessonJobs" -}}
{{- if and .Values.teacher.enabled (eq .Values.teacher.runner "pytorchjob") -}}true{{- end -}}
{{- end -}}

{{/*
Fields that all pods have. They meet the restricted Pod Security level. Takes (list $ "component"), and as a third member the values
of the pods, if the component has no section of its own.
*/}}
{{- define "nanochat.podDefaults" -}}
{{- $root := index . 0 -}}
{{- $values := include "nanochat.podValues" . | fromYaml -}}
serviceAccountName: {{ include "nanochat.fullname" $root }}-{{ index . 1 }}
{{- /* Only the pod that creates the PyTorchJobs of lessons calls the API server. */}}
automountServiceAccountToken: {{ and (eq (index . 1) "teacher") (include "nanochat.lessonJobs" $root | eq "true") }}
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.pod }}
{{ toYaml . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if include "nanochat.onOneNode" . }}
affinity:
  podAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride }}
              app.kubernetes.io/instance: {{ $root.Release.Name }}
            matchExpressions:
              - {key: app.kubernetes.io/component, operator: In, values: [engine{{ if include "nanochat.bootstraps" $root }}, bootstrap{{ end }}{{ if $root.Values.teacher.enabled }}, gateway, teacher{{ end }}{{ if include "nanochat.lessonJobs" $root }}, lesson{{ end }}]}
{{- else }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- if eq (index . 1) "engine" }}
        {{- include "nanochat.engineSelectorLabels" $root | nindent 8 }}
        {{- else }}
        {{- include "nanochat.selectorLabels" . | nindent 8 }}
        {{- end }}
{{- end }}
{{- end -}}

{{- define "nanochat.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* "true" if all engines end while no requests come, so that a request may have to wait for the start of an engine. */}}
{{- define "nanochat.zeroEngines" -}}
{{- if and .Values.engine.keda.enabled (not .Values.engine.keda.minReplicas) -}}true{{- end -}}
{{- end -}}

{{/*
Refuses the time limit of a proxy if an answer may take longer because it first waits for the start of an engine. Takes
(list $ "value that sets the limit" seconds).
*/}}
{{- define "nanochat.checkProxyLimit" -}}
{{- $root := index . 0 -}}
{{- if include "nanochat.zeroEngines" $root -}}
{{- $queue := get $root.Values.gateway.extraEnv "NANOCHAT_GATEWAY_QUEUE_SECONDS" | default $root.Values.engine.startupSeconds -}}
{{- $answer := get $root.Values.gateway.extraEnv "NANOCHAT_GATEWAY_REQUEST_TIMEOUT_SECONDS" | default 600 -}}
{{- $longest := addf (float64 $queue) (float64 $answer) -}}
{{- if lt (float64 (index . 2)) $longest -}}
{{- fail (printf "%s is %v seconds, but with engine.keda.minReplicas=0 a request may wait %v seconds for an engine, and its answer may then take %v seconds; set at least %v" (index . 1) (index . 2) $queue $answer $longest) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Environment variables from a mapping of names to values. */}}
{{- define "nanochat.env" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{/* Environment variables of mutual TLS. */}}
{{- define "nanochat.tlsEnv" -}}
{{- if .Values.tls.enabled -}}
- name: NANOCHAT_TLS_CA
  value: /etc/nanochat/tls/ca.crt
- name: NANOCHAT_TLS_CERTIFICATE
  value: /etc/nanochat/tls/tls.crt
- name: NANOCHAT_TLS_KEY
  value: /etc/nanochat/tls/tls.key
{{- end -}}
{{- end -}}

{{/* Mount of the Secret with a component's certificate, without subPath, so that it follows changes of the Secret. */}}
{{- define "nanochat.tlsMount" -}}
{{- if .Values.tls.enabled -}}
- name: tls
  mountPath: /etc/nanochat/tls
  readOnly: true
{{- end -}}
{{- end -}}

{{/* Name of the Secret with a component's certificate. Takes (list $ "component"). */}}
{{- define "nanochat.tlsSecret" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- if $root.Values.tls.certManager.issuer -}}
{{- include "nanochat.fullname" $root }}-{{ $component }}-tls
{{- else -}}
{{- required (printf "tls.secrets.%s is needed with tls.enabled=true, or else tls.certManager.issuer" $component) (index $root.Values.tls.secrets $component) -}}
{{- end -}}
{{- end -}}

{{/* Metadata and spec of a component's Certificate. Takes (list $ "component"). */}}
{{- define "nanochat.certificate" -}}
{{- $root := index . 0 -}}
{{- $name := printf "%s-%s" (include "nanochat.fullname" $root) (index . 1) -}}
metadata:
  name: {{ $name }}
  labels:
    {{- include "nanochat.labels" . | nindent 4 }}
spec:
  secretName: {{ include "nanochat.tlsSecret" . }}
  # The name of the component's service: callers verify that the certificate contains the host name in their settings.
  dnsNames: [{{ $name }}]
  usages: [client auth, server auth]
  issuerRef: {name: {{ $root.Values.tls.certManager.issuer }}, kind: {{ $root.Values.tls.certManager.kind }}}
{{- end -}}

{{/* Volume with a component's Secret. Takes (list $ "component"). */}}
{{- define "nanochat.tlsVolume" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- if $root.Values.tls.enabled -}}
- name: tls
  secret:
    secretName: {{ include "nanochat.tlsSecret" . }}
    defaultMode: 0440
{{- end -}}
{{- end -}}

{{/* Environment variables of the export of traces. */}}
{{- define "nanochat.tracingEnv" -}}
{{- with .Values.tracing.otlpEndpoint -}}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . }}
{{- end -}}
{{- end -}}

{{/* Egress rule for the collector of traces. */}}
{{- define "nanochat.tracingEgress" -}}
{{- if .Values.tracing.otlpEndpoint -}}
- ports:
    {{- range .Values.networkPolicy.otlpPorts }}
    - {port: {{ . }}}
    {{- end }}
  {{- with .Values.networkPolicy.otlpTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* Egress rule for an S3 store. */}}
{{- define "nanochat.storeEgress" -}}
{{- if eq .Values.store.type "s3" -}}
- ports:
    {{- range .Values.networkPolicy.s3Ports }}
    - {port: {{ . }}}
    {{- end }}
  {{- with .Values.networkPolicy.s3To }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* Egress rule for the API server of the cluster. */}}
{{- define "nanochat.apiServerEgress" -}}
- ports:
    {{- range .Values.networkPolicy.apiServerPorts }}
    - {port: {{ . }}}
    {{- end }}
  {{- with .Values.networkPolicy.apiServerTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* Environment variables of the gateway's API keys and limits. */}}
{{- define "nanochat.admissionEnv" -}}
{{- with .Values.admission -}}
- name: NANOCHAT_GATEWAY_ANONYMOUS_SCOPES
  value: {{ join "," .anonymousScopes | default "none" }}
- name: NANOCHAT_GATEWAY_REQUESTS_PER_MINUTE
  value: {{ .requestsPerMinute | int | quote }}
- name: NANOCHAT_GATEWAY_TOKENS_PER_MINUTE
  value: {{ .tokensPerMinute | int | quote }}
- name: NANOCHAT_GATEWAY_PARALLEL_ANSWERS
  value: {{ .parallelAnswers | int | quote }}
{{- if and .keysSecret .redis.secret }}
{{- fail "admission.keysSecret and admission.redis.secret are two places for the keys; set only one of them" }}
{{- end }}
{{- if and $.Values.redis.enabled (or .keysSecret .redis.secret) }}
{{- $other := ternary "admission.keysSecret" "admission.redis.secret" (empty .redis.secret) }}
{{- fail (printf "redis.enabled and %s are two places for the keys; set only one of them" $other) }}
{{- end }}
{{- if .keysSecret }}
- name: NANOCHAT_KEYS_FILE
  value: /etc/nanochat/keys/keys.json
{{- end }}
{{- if .redis.secret }}
- name: NANOCHAT_REDIS_URL
  valueFrom:
    secretKeyRef: {name: {{ .redis.secret }}, key: url}
{{- end }}
{{- if $.Values.redis.enabled }}
{{ include "nanochat.redisPasswordEnv" $ }}
# Kubernetes replaces $(REDIS_PASSWORD) by the password.
- name: NANOCHAT_REDIS_URL
  value: redis://:$(REDIS_PASSWORD)@{{ include "nanochat.fullname" $ }}-redis:6379/0
{{- end }}
{{- if or .redis.secret $.Values.redis.enabled }}
- name: NANOCHAT_GATEWAY_REDIS_FAILURE
  value: {{ .redis.failure }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* Name of the Secret with the password of the release's Redis. */}}
{{- define "nanochat.redisSecret" -}}
{{- default (printf "%s-redis" (include "nanochat.fullname" .)) .Values.redis.existingSecret -}}
{{- end -}}

{{/* Environment variable with the password of the release's Redis. */}}
{{- define "nanochat.redisPasswordEnv" -}}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ include "nanochat.redisSecret" . }}, key: password}
{{- end -}}

{{/* Egress rule for Redis. */}}
{{- define "nanochat.redisEgress" -}}
{{- if .Values.redis.enabled -}}
- to:
    - podSelector:
        matchLabels:
          {{- include "nanochat.selectorLabels" (list . "redis") | nindent 10 }}
  ports:
    - {port: 6379}
{{- else if .Values.admission.redis.secret -}}
- ports:
    {{- range .Values.networkPolicy.redisPorts }}
    - {port: {{ . }}}
    {{- end }}
  {{- with .Values.networkPolicy.redisTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* "true" if the release trains the demo model when the store has none; otherwise empty. */}}
{{- define "nanochat.bootstraps" -}}
{{- if and .Values.bootstrap.enabled (eq .Values.model "demo") -}}true{{- end -}}
{{- end -}}

{{/* Scheme of the gateway's port. */}}
{{- define "nanochat.gatewayScheme" -}}
{{- if .Values.gateway.httpsSecret }}https{{ else }}http{{ end -}}
{{- end -}}

{{- define "nanochat.storeClaim" -}}
{{- default (printf "%s-store" (include "nanochat.fullname" .)) .Values.store.pvc.existingClaim -}}
{{- end -}}

{{/* Name of the Secret with the S3 keys; empty if the service account itself has permission to use the store. */}}
{{- define "nanochat.s3Secret" -}}
{{- if .Values.store.s3.existingSecret -}}
{{- .Values.store.s3.existingSecret -}}
{{- else if .Values.store.s3.accessKeyId -}}
{{- include "nanochat.fullname" . }}-s3
{{- end -}}
{{- end -}}

{{/* Egress rule for DNS. */}}
{{- define "nanochat.dnsEgress" -}}
- to:
    {{- toYaml .Values.networkPolicy.dnsTo | nindent 4 }}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end -}}

{{/* NetworkPolicy peers that may scrape metrics. */}}
{{- define "nanochat.metricsFrom" -}}
{{- toYaml (default (list (dict "namespaceSelector" dict)) .Values.networkPolicy.metricsFrom) -}}
{{- end -}}

{{/* Environment variables that tell where the store is. */}}
{{- define "nanochat.storeEnv" -}}
{{- if eq .Values.store.type "pvc" -}}
- name: NANOCHAT_HOME
  value: /var/lib/nanochat
{{- else -}}
- name: NANOCHAT_HOME
  value: {{ required "store.s3.url is needed with store.type=s3" .Values.store.s3.url }}
- name: AWS_REGION
  value: {{ .Values.store.s3.region }}
{{- with .Values.store.s3.endpoint }}
- name: AWS_ENDPOINT_URL
  value: {{ . }}
{{- end }}
{{- $secret := include "nanochat.s3Secret" . -}}
{{- if $secret -}}
{{- range $key := list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ $key }}
  valueFrom:
    secretKeyRef: {name: {{ $secret }}, key: {{ $key }}}
{{- end }}
{{- end }}
{{- end -}}
{{- end -}}

{{/*
Container and volumes of the pods that process lessons. Takes a dictionary with the root, the container's name, args and
resources, and further volumes and their mounts, which may be empty.
*/}}
{{- define "nanochat.teacherPod" -}}
{{- $root := .root -}}
containers:
  - name: {{ .container }}
    image: {{ include "nanochat.image" (list $root "teacher") }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    securityContext:
      {{- include "nanochat.containerSecurityContext" $root | nindent 6 }}
    {{- with .args }}
    args: {{ toJson . }}
    {{- end }}
    env:
      - name: OMP_NUM_THREADS
        valueFrom:
          resourceFieldRef: {containerName: {{ .container }}, resource: limits.cpu}
      {{- include "nanochat.storeEnv" $root | nindent 6 }}
      {{- with $root.Values.teacher.extraEnv }}
      {{- include "nanochat.env" . | trim | nindent 6 }}
      {{- end }}
    resources:
      {{- toYaml .resources | nindent 6 }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: shm, mountPath: /dev/shm}
      {{- if eq $root.Values.store.type "pvc" }}
      - {name: store, mountPath: /var/lib/nanochat}
      {{- end }}
      {{- with concat $root.Values.teacher.extraVolumeMounts .mounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - name: tmp
    emptyDir: {sizeLimit: 4Gi}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: 1Gi}
  {{- if eq $root.Values.store.type "pvc" }}
  - name: store
    persistentVolumeClaim:
      claimName: {{ include "nanochat.storeClaim" $root }}
  {{- end }}
  {{- with concat $root.Values.teacher.extraVolumes .volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Environment variables of a gateway that accepts lessons. The gateway does not get the S3 keys of the store. */}}
{{- define "nanochat.lessonsEnv" -}}
{{- if .Values.teacher.enabled -}}
- name: NANOCHAT_GATEWAY_LESSONS_HOME
{{- if eq .Values.store.type "pvc" }}
  value: /var/lib/nanochat
{{- else }}
  value: {{ .Values.store.s3.url }}
- name: AWS_REGION
  value: {{ .Values.store.s3.region }}
{{- with .Values.store.s3.endpoint }}
- name: AWS_ENDPOINT_URL
  value: {{ . }}
{{- end }}
{{- with .Values.teacher.gatewaySecret }}
{{- range $key := list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ $key }}
  valueFrom:
    secretKeyRef: {name: {{ $.Values.teacher.gatewaySecret }}, key: {{ $key }}}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* Resources of the engine, with its GPUs under limits, where Kubernetes expects them. */}}
{{- define "nanochat.engineResources" -}}
{{- $resources := deepCopy .Values.engine.resources -}}
{{- if .Values.engine.gpu.count -}}
{{- $limits := set (default dict $resources.limits) .Values.engine.gpu.resourceName .Values.engine.gpu.count -}}
{{- $resources = set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Metadata and spec of a component's autoscaler. Takes (list $ "component"). */}}
{{- define "nanochat.autoscaler" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $values := (index $root.Values $component).autoscaling -}}
{{- $name := $root.Name | default (printf "%s-%s" (include "nanochat.fullname" $root) $component) -}}
{{- if lt (int $values.maxReplicas) (int $values.minReplicas) -}}
{{- fail (printf "%s.autoscaling.maxReplicas is %d; it must be at least %s.autoscaling.minReplicas, which is %d" $component (int $values.maxReplicas) $component (int $values.minReplicas)) -}}
{{- end -}}
{{- if not (or $values.cpuPercent $values.waitingRequests $values.cachePercent) -}}
{{- fail (printf "%s.autoscaling has no target; set %s.autoscaling.cpuPercent" $component $component) -}}
{{- end -}}
{{- if and $values.cpuPercent (not (dig "requests" "cpu" "" (index $root.Values $component).resources)) -}}
{{- fail (printf "%s.autoscaling.cpuPercent is a share of %s.resources.requests.cpu, which is not set" $component $component) -}}
{{- end -}}
metadata:
  name: {{ $name }}
  labels:
    {{- include "nanochat.labels" . | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ $name }}}
  minReplicas: {{ $values.minReplicas }}
  maxReplicas: {{ $values.maxReplicas }}
  behavior:
    scaleDown:
      stabilizationWindowSeconds: {{ $values.scaleDownSeconds }}
  metrics:
    {{- with $values.cpuPercent }}
    - type: Resource
      resource:
        name: cpu
        target: {type: Utilization, averageUtilization: {{ . }}}
    {{- end }}
    {{- with $values.waitingRequests }}
    - type: Pods
      pods:
        metric: {name: nanochat_engine_requests_waiting}
        target: {type: AverageValue, averageValue: {{ . | quote }}}
    {{- end }}
    {{- with $values.cachePercent }}
    - type: Pods
      pods:
        metric: {name: nanochat_engine_kv_cache_usage_ratio}
        target: {type: AverageValue, averageValue: {{ mul . 10 }}m}
    {{- end }}
{{- end -}}

{{/*
Sets .Values.engines to a list of contexts: one for each served model, and one for the canary if there is one. The templates of
an engine are rendered once for each context. A context has the fields of the chart's root context, the model's own .Values.model
and .Values.engine, the name of the engine's resources (.Name), and .Track (stable or canary).
*/}}
{{- define "nanochat.setEngines" -}}
{{- $engines := list -}}
{{- $names := list -}}
{{- range $index, $model := prepend .Values.models (dict "name" .Values.model) -}}
{{- $name := printf "%s-engine" (include "nanochat.fullname" $) -}}
{{- if $index -}}
{{- $name = printf "%s-%s" $name (regexReplaceAll "[^a-z0-9]+" (lower $model.name) "-") | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- if or (has $name $names) (and $index (eq $model.name $.Values.model)) -}}
{{- fail (printf "models[%d].name is %s, which another engine of the release serves" (sub $index 1) $model.name) -}}
{{- end -}}
{{- $names = append $names $name -}}
{{- $own := dict "model" $model.name "engine" (omit $model "name") -}}
{{- $values := mergeOverwrite (deepCopy (omit $.Values "engines")) $own -}}
{{- $engines = append $engines (dict "Name" $name "Track" "stable" "Values" $values "Chart" $.Chart "Release" $.Release) -}}
{{- end -}}
{{- with .Values.canary.revision -}}
{{- if eq . $.Values.engine.revision -}}
{{- fail (printf "canary.revision is %s, which engine.revision serves already" .) -}}
{{- end -}}
{{- $name := printf "%s-engine-canary" (include "nanochat.fullname" $) -}}
{{- if has $name $names -}}
{{- fail "models has an entry with the name canary, but canary.revision needs this name for its engines; rename the entry" -}}
{{- end -}}
{{- $off := dict "enabled" false -}}
{{- $own := dict "engine" (dict "revision" . "replicas" $.Values.canary.replicas "autoscaling" $off "keda" $off) -}}
{{- $values := mergeOverwrite (deepCopy (omit $.Values "engines")) $own -}}
{{- $engines = append $engines (dict "Name" $name "Track" "canary" "Values" $values "Chart" $.Chart "Release" $.Release) -}}
{{- end -}}
{{- $_ := set .Values "engines" $engines -}}
{{- end -}}

{{/* Labels that select the engines of one model, or of its canary. Takes the context of an engine. */}}
{{- define "nanochat.engineSelectorLabels" -}}
{{ include "nanochat.selectorLabels" (list . "engine") }}
nanochat/model: {{ .Values.model | quote }}
nanochat/track: {{ .Track }}
{{- end -}}

{{/* Metadata and spec of the pod that trains the demo model. */}}
{{- define "nanochat.bootstrapPod" -}}
metadata:
  labels:
    {{- include "nanochat.labels" (list . "bootstrap") | nindent 4 }}
  {{- with .Values.bootstrap.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "nanochat.podDefaults" (list . "bootstrap") | nindent 2 }}
  restartPolicy: Never
  terminationGracePeriodSeconds: 120
  containers:
    - name: train
      image: {{ include "nanochat.image" (list . "bootstrap") }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      securityContext:
        {{- include "nanochat.containerSecurityContext" . | nindent 8 }}
      args: [python, -m, jobs.train.pipeline, --recipe=demo, --model={{ .Values.model }}, --unless-promoted]
      env:
        - name: OMP_NUM_THREADS
          valueFrom:
            resourceFieldRef: {containerName: train, resource: limits.cpu}
        {{- include "nanochat.storeEnv" . | nindent 8 }}
        {{- with .Values.bootstrap.extraEnv }}
        {{- include "nanochat.env" . | trim | nindent 8 }}
        {{- end }}
      resources:
        {{- toYaml .Values.bootstrap.resources | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- if eq .Values.store.type "pvc" }}
        - {name: store, mountPath: /var/lib/nanochat}
        {{- end }}
        {{- with .Values.bootstrap.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: 4Gi}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: 1Gi}
    {{- if eq .Values.store.type "pvc" }}
    - name: store
      persistentVolumeClaim:
        claimName: {{ include "nanochat.storeClaim" . }}
    {{- end }}
    {{- with .Values.bootstrap.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/*
PromQL expression: the number of sequences in the engines of one model, plus the number of requests that wait in the gateways. If
no pod reports a metric, its value is 0. Takes the context of an engine.
*/}}
{{- define "nanochat.engineLoad" -}}
{{- $engines := printf "namespace=%q,pod=~%q" .Release.Namespace (printf "%s-[a-z0-9]+-[a-z0-9]+" .Name) -}}
{{- $gateways := printf "namespace=%q,pod=~%q" .Release.Namespace (printf "%s-gateway-.+" (include "nanochat.fullname" .)) -}}
{{- $states := list "running" "waiting" "parked" -}}
{{- range $states -}}
(sum(nanochat_engine_requests_{{ . }}{ {{- $engines -}} }) or vector(0)) + {{ end -}}
(sum(nanochat_gateway_queue_length{ {{- $gateways -}} }) or vector(0))
{{- end -}}
